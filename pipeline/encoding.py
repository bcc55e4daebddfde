"""A layer's mask as it is stored: one bit per weight, or the columns that are removed, whichever is smaller.

In memory a mask is packed bits, uint8 ``[N, ceil(K / 8)]``, True = kept. Stored it is these bits, or a list: uint16
``[N + R]``, for every row the number of its removed weights, then the columns of the R removed weights, row by row and
rising within a row. The type tells which. docs/format.md is the definition.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.ops.pack_bits import pack_bits, unpack_bits

LISTED_COLUMNS = 1 << 16
"""Layers of so many columns or more have no list: a column, and the number of a row's columns, has 16 bits."""
AT_ONCE = 1 << 24
"""Weights that are unpacked at a time."""
_ONES = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.int64)


def bytes_of(columns: int) -> int:
    """Bytes of a packed row."""
    return (columns + 7) // 8


def least_bytes(rows: int, columns: int) -> int:
    """Bytes that a stored mask ``[N, K]`` has at least: where a list is smaller, those of one that removes nothing."""
    bitmap = rows * bytes_of(columns)
    return min(2 * rows, bitmap) if columns < LISTED_COLUMNS else bitmap


def worth_listing(rows: int, columns: int, removed: int) -> bool:
    """Whether ``removed`` weights of ``[N, K]`` are stored as a list: where that is smaller than one bit per weight."""
    return columns < LISTED_COLUMNS and 2 * (rows + removed) < rows * bytes_of(columns)


def stored_as(rows: int, columns: int, removed: int) -> tuple[torch.dtype, list[int]]:
    """Type and shape of what is stored of a mask ``[N, K]`` that removes ``removed`` weights."""
    if worth_listing(rows, columns, removed):
        return torch.uint16, [rows + removed]
    return torch.uint8, [rows, bytes_of(columns)]


def encode(bits: Tensor, columns: int) -> Tensor:
    """What is stored of packed ``bits`` uint8 ``[N, ceil(K / 8)]``, on the CPU; ``columns`` is K."""
    bits = bits.cpu()
    parts = bits.split(_step(columns))
    removed = len(bits) * columns - sum(int(_ONES[part.flatten().long()].sum()) for part in parts)
    if not worth_listing(len(bits), columns, removed):
        return bits
    counts, listed = [], []
    for part in parts:
        gone = ~unpack_bits(part, columns)
        counts.append(gone.sum(1))
        listed.append(gone.nonzero()[:, 1])
    return torch.cat([*counts, *listed]).to(torch.uint16)


def check_stored(name: str, dtype: str, found: list[int], shape: tuple[int, int], lists: bool) -> None:
    """Raise ValueError unless a tensor in a file's header can be the mask of layer ``name``, whose ``shape`` is N, K.

    ``dtype`` and ``found`` are the tensor's type, as safetensors names it, and shape. ``lists``: it may be a list.
    """
    rows, columns = shape
    if lists and dtype == "U16":
        if len(found) != 1 or found[0] < rows or not worth_listing(rows, columns, found[0] - rows):
            raise ValueError(f"mask of {name} is a list {found}; one of [{rows}, {columns}] is not stored like that")
    elif dtype != "U8" or found != [rows, bytes_of(columns)]:
        raise ValueError(f"mask of {name} is {found} {dtype}, expected {[rows, bytes_of(columns)]} U8")


def decode(name: str, stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """The packed bits of what ``check_stored`` let pass. Raises ValueError for contents that are no mask."""
    rows, columns = shape
    if stored.dtype == torch.uint8:
        if columns % 8 and bool((stored[:, -1] >> columns % 8).any()):
            raise ValueError(f"the mask of {name} has bits behind its last column")
        return stored
    counts, listed = stored[:rows].to(torch.int64), stored[rows:]
    if int(counts.sum()) != listed.numel():
        raise ValueError(f"the mask of {name} lists {listed.numel()} columns, its rows have {int(counts.sum())}")
    bits = torch.empty(rows, bytes_of(columns), dtype=torch.uint8)
    for first, last, mine in _rows_of(counts, listed, _step(columns)):
        try:
            bits[first:last] = _cleared(counts[first:last], mine.to(torch.int64), columns)
        except ValueError as error:
            raise ValueError(f"the mask of {name} lists {error}") from error
    return bits


def _cleared(counts: Tensor, listed: Tensor, columns: int) -> Tensor:
    """Packed rows without the ``listed`` columns int64, ``counts`` of them in each row."""
    places = torch.arange(len(counts)).repeat_interleave(counts) * columns + listed
    if listed.numel() and int(listed.max()) >= columns:
        raise ValueError(f"column {int(listed.max())} of {columns}")
    if bool((places.diff() <= 0).any()):
        raise ValueError("columns that do not rise within a row")
    kept = torch.ones(len(counts) * columns, dtype=torch.bool)
    kept[places] = False
    return pack_bits(kept.reshape(len(counts), columns))


def _rows_of(counts: Tensor, listed: Tensor, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """``step`` rows at a time: the first, the one behind the last, and their columns."""
    start = 0
    for first in range(0, len(counts), step):
        last = min(first + step, len(counts))
        stop = start + int(counts[first:last].sum())
        yield first, last, listed[start:stop]
        start = stop


def _step(columns: int) -> int:
    return max(1, AT_ONCE // max(columns, 1))
