"""The masked product in C++ (``csrc/masked_linear``): few rows directly (in bfloat16 on matrix tiles where there are
any), many by dense products of gated panels."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import native
from kernels.ops.masked_linear.reference import check_personas, masked_linear_reference

PANEL_BYTES = 4 << 20
"""A gated panel stays in a cache until its product has read it; with 1 MB torch's products are too narrow (64 rows of
4096 x 4096 in float32: 86 ms with 1 MB, 64 ms with 4 MB, 85 ms with 16 MB)."""
MOST_ROWS_DIRECT, MOST_ROWS_TILED = 32, 128
"""Rows of one persona."""
TILED = "amx_bf16"
"""The instruction set that has matrix tiles, for bfloat16."""


def masked_linear_cpp(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.masked_linear``."""
    if x.dtype == torch.float64:
        # For checks of gradients, not for speed: the kernels add up in float32.
        return masked_linear_reference(x, weight, bits, persona, gamma, bias)
    if bits.shape[2] > 1 and bits.stride(2) != 1:
        bits = bits.contiguous()
    # Few rows are not asked: it would take a tenth of a small layer's time.
    many = x.shape[0] > MOST_ROWS_DIRECT and x.dtype == torch.bfloat16
    tiled = many and native.instruction_set() == TILED
    if use_direct(x.shape[0], personas_in(persona, x.shape[0]), adjacent_columns(weight), tiled):
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        if not torch.ops.persona_native.masked_linear(x, weight, bits, persona, gamma, bias, y):
            check_personas(persona, bits.shape[0])
        return y
    return by_panels(x, weight, bits, persona, gamma, bias)


def adjacent_columns(weight: Tensor) -> bool:
    return weight.stride(1) == 1 or weight.shape[1] < 2 or weight.shape[0] == 0


def personas_in(persona: Tensor, rows: int) -> int:
    """How many personas the rows have; only more than 1 and few rows are not looked at."""
    return persona.shape[0] if rows <= MOST_ROWS_DIRECT or persona.shape[0] == 1 else persona.unique().numel()


def use_direct(rows: int, personas: int, adjacent: bool, tiled: bool = False) -> bool:
    """Whether the kernel that reads the weight once for all rows is used, and not gated panels.

    Milliseconds for 4096 x 4096 in float32 / bfloat16, one thread of a busy machine with AVX-512: 32 rows of one
    persona 37 / 28 directly, 48 / 41 by panels; 64 rows 60 / 60 and 54 / 57; 64 rows of 4 personas 100 / 89 and
    131 / 110; of 16 personas 111 / 86 and 323 / 227. On tiles (``tiled``), bfloat16, another machine: 64 rows of one
    persona 4.4 and 9.0, 128 rows 7.0 and 10.7, 256 rows 13 to 16 and 14; 256 rows of 16 personas 21 and 160. The
    kernel wants the columns of the weight ``adjacent``.
    """
    if not adjacent:
        return False
    if tiled:
        return rows <= MOST_ROWS_TILED * personas
    return rows <= max(MOST_ROWS_DIRECT, 16 * personas if personas > 1 else 0)


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


def panel_rows(rows: int, row_bytes: int) -> Iterator[slice]:
    """The rows of a weight, about ``PANEL_BYTES`` of them at a time."""
    count = max(32, PANEL_BYTES // max(1, row_bytes) // 32 * 32)
    return (slice(start, min(start + count, rows)) for start in range(0, rows, count))


def panels(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Panels of the weight whose columns lie side by side."""
    for panel in panel_rows(weight.shape[0], weight.shape[1] * weight.element_size()):
        yield panel, weight[panel] if adjacent_columns(weight) else weight[panel].contiguous()
