"""The masked product in C++ (``csrc/masked_linear``), and dense products of gated panels where torch's are faster."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import native
from kernels.ops.masked_linear.reference import check_personas, masked_linear_reference

PANEL_BYTES = 8 << 20
"""A gated panel stays in a cache until its product has read it, and torch's products want wide ones (4096 x 4096 in
float32, 256 rows: 82 ms with 2 MB, 73 with 4, 70 with 8 and 16, 81 with 32; 1024 rows: 270, 239, 227, 225 and 235)."""
FEW_ROWS = 24
"""No instruction set has faster panels for these rows of one persona."""
MOST_ROWS = {
    torch.float32: {"portable": 24, "avx2": 48, "avx512": 192, "avx512_bf16": 192, "amx_bf16": 192},
    torch.bfloat16: {"avx512_bf16": 24},
}
"""Rows of a persona that the native product takes, by instruction set; all where nothing is said."""


def masked_linear_cpp(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.masked_linear``."""
    if x.dtype == torch.float64:
        # For checks of gradients, not for speed: the kernels add up in float32.
        return masked_linear_reference(x, weight, bits, persona, gamma, bias)
    if bits.shape[2] > 1 and bits.stride(2) != 1:
        bits = bits.contiguous()
    if adjacent_columns(weight) and use_direct(x, persona):
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        if not torch.ops.persona_native.masked_linear(x, weight, bits, persona, gamma, bias, y):
            check_personas(persona, bits.shape[0])
        return y
    return by_panels(x, weight, bits, persona, gamma, bias)


def adjacent_columns(weight: Tensor) -> bool:
    return weight.stride(1) == 1 or weight.shape[1] < 2 or weight.shape[0] == 0


def use_direct(x: Tensor, persona: Tensor) -> bool:
    """Whether the native product is used, and not torch's products of gated panels.

    Milliseconds for 4096 x 4096 and one persona, one thread, direct / by panels. float32 with AVX-512: 64 rows 22 / 29,
    128 rows 39 / 42, 256 rows 73 / 70, 1024 rows 261 / 227; with AVX2 (same machine, torch held to AVX2, too): 32 rows
    22 / 24, 64 rows 35 / 34. bfloat16 on tiles 4.5 / 8.7, 256 rows 11 / 14, 1024 rows 33 / 34, with dot products alone
    (AMD, Zen 4) 32 rows 8.6 / 8.3, 64 rows 13.4 / 13.1, 256 rows 45 / 42, 1024 rows 170 / 162, and 1536 x 576 1.00 /
    0.84 for 64 rows; with AVX2 34 / 126 and 116 / 463, as for float16: torch has no fast product of it there.
    """
    rows = x.shape[0]
    if rows <= FEW_ROWS:
        return True  # Nothing more is asked: it would take a tenth of a small layer's time.
    most = most_rows(x.dtype)
    return rows <= most or (persona.shape[0] > 1 and rows <= most * persona.unique().numel())


def most_rows(dtype: torch.dtype) -> float:
    """Of one persona that the native product takes with the instruction set in use."""
    return MOST_ROWS.get(dtype, {}).get(native.instruction_set(), math.inf)


def by_panels(x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None) -> Tensor:
    """A dense product for each persona, with a panel of the weight at a time, gated for one persona after the other."""
    check_personas(persona, bits.shape[0])
    order, segments = segments_of(persona, x.shape[0])
    ordered = x if order is None else x[order]
    y = x.new_empty(x.shape[0], weight.shape[0])
    gated = None
    for panel, weight_panel in panels(weight):
        # The first panel is the largest.
        gated = torch.empty_like(weight_panel) if gated is None else gated[: weight_panel.shape[0]]
        bias_panel = None if bias is None else bias[panel]
        for index, rows in segments:
            if index >= 0:
                torch.ops.persona_native.gate_rows(weight_panel, bits[index, panel], gamma, gated)
            dense_product(ordered[rows], gated if index >= 0 else weight_panel, bias_panel, y[rows, panel])
    return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """``y = x weight^T + bias`` into a part of a result, which a product of its own would have to be copied to."""
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def segments_of(persona: Tensor, count: int) -> tuple[Tensor | None, list[tuple[int, slice]]]:
    """The order that brings the rows of a persona together (None: they are), and what each persona has of it."""
    if persona.shape[0] == 1:
        return None, [(int(persona), slice(0, count))]
    order = None
    if bool((persona[1:] < persona[:-1]).any()):
        persona, order = persona.sort(stable=True)
    present, counts = persona.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends][:-1]
    return order, [(p, slice(a, b)) for p, a, b in zip(present.tolist(), starts, ends, strict=True)]


def panel_rows(rows: int, row_bytes: int, panel_bytes: int = PANEL_BYTES) -> Iterator[slice]:
    """The rows of a weight, about ``panel_bytes`` of them at a time."""
    count = max(32, panel_bytes // max(1, row_bytes) // 32 * 32)
    return (slice(start, min(start + count, rows)) for start in range(0, rows, count))


def panels(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Panels of the weight whose columns lie side by side."""
    for panel in panel_rows(weight.shape[0], weight.shape[1] * weight.element_size()):
        yield panel, weight[panel] if adjacent_columns(weight) else weight[panel].contiguous()
