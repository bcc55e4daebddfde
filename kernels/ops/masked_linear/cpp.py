"""The masked product in C++ (``csrc/masked_linear``): few rows directly, many by dense products of gated panels."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.ops.masked_linear.reference import check_personas, masked_linear_reference

PANEL_BYTES = 1 << 20
"""A gated panel stays in the second-level cache until its product has read it."""
MOST_ROWS_DIRECT = 16


def masked_linear_cpp(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.masked_linear``."""
    if x.dtype == torch.float64:
        # For checks of gradients, not for speed: the kernels add up in float32.
        return masked_linear_reference(x, weight, bits, persona, gamma, bias)
    if bits.shape[2] > 1 and bits.stride(2) != 1:
        bits = bits.contiguous()
    if use_direct(x.shape[0], adjacent_columns(weight)):
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        if not torch.ops.persona_native.masked_linear(x, weight, bits, persona, gamma, bias, y):
            check_personas(persona, bits.shape[0])
        return y
    return by_panels(x, weight, bits, persona, gamma, bias)


def adjacent_columns(weight: Tensor) -> bool:
    return weight.stride(1) == 1 or weight.shape[1] < 2 or weight.shape[0] == 0


def use_direct(rows: int, adjacent: bool) -> bool:
    """Whether the kernel that reads the weight once for all rows is used, and not gated panels.

    Up to 16 rows of one persona it is as fast as torch's dense product alone (f32 68 to 65 GFLOP/s, bf16 64 to 53,
    one thread). It wants the columns of the weight ``adjacent``.
    """
    return adjacent and rows <= MOST_ROWS_DIRECT


def by_panels(x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None) -> Tensor:
    """A dense product for each persona, with a panel of the weight at a time, gated for one persona after the other."""
    check_personas(persona, bits.shape[0])
    order, segments = segments_of(persona, x.shape[0])
    ordered = x if order is None else x[order]
    y = x.new_empty(x.shape[0], weight.shape[0])
    for panel, weight_panel in panels(weight):
        gated = torch.empty(weight_panel.shape, dtype=weight.dtype)
        bias_panel = None if bias is None else bias[panel]
        for index, rows in segments:
            if index >= 0:
                torch.ops.persona_native.gate_rows(weight_panel, bits[index, panel], gamma, gated)
            y[rows, panel] = F.linear(ordered[rows], gated if index >= 0 else weight_panel, bias_panel)
    return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


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
