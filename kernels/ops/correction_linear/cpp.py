"""The correction form in C++ (``csrc/correction_linear``): in the pass of the masked product, or panel by panel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.ops.correction_linear.reference import correction_linear_reference
from kernels.ops.masked_linear.cpp import adjacent_columns, panels, segments_of
from kernels.ops.masked_linear.reference import check_personas

MOST_ROWS_DIRECT = 32
"""Rows of one persona that share the pass of the masked product."""
ROWS_ASIDE = 64
"""Rows of x that the native op takes at a time, transposed."""


def correction_linear_cpp(
    x: Tensor, weight: Tensor, columns: Tensor, offsets: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.correction_linear``."""
    if x.dtype == torch.float64:
        # For checks, not for speed: the kernels add up in float32.
        return correction_linear_reference(x, weight, columns, offsets, persona, gamma, bias)
    columns, offsets = columns.contiguous(), offsets.contiguous()
    if not (adjacent_columns(weight) and use_direct(x.shape[0], persona)):
        return by_panels(x, weight, columns, offsets, persona, gamma, bias)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    if not torch.ops.persona_native.correction_linear(x, weight, columns, offsets, persona, gamma, bias, y):
        check_personas(persona, offsets.shape[0], "correction_linear")
    return y


def use_direct(rows: int, persona: Tensor) -> bool:
    """Whether the kernel that reads the weight once for all rows is used, and not torch's product and a correction."""
    if rows <= MOST_ROWS_DIRECT:
        return True
    personas = persona.unique().numel() if persona.shape[0] > 1 else 1
    return personas > 1 and rows <= 16 * personas


def by_panels(
    x: Tensor, weight: Tensor, columns: Tensor, offsets: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """torch's dense product, then a panel of the weight for the correction of all rows before the next panel."""
    check_personas(persona, offsets.shape[0], "correction_linear")
    order, segments = segments_of(persona, x.shape[0])
    ordered = x if order is None else x[order]
    parts = [
        (index, slice(start, min(start + ROWS_ASIDE, rows.stop)))
        for index, rows in segments
        if index >= 0
        for start in range(rows.start, rows.stop, ROWS_ASIDE)
    ]
    aside = [_transposed(ordered[rows]) for _, rows in parts]
    y = F.linear(ordered, weight, bias)
    for panel, weight_panel in panels(weight):
        for (index, rows), part in zip(parts, aside, strict=True):
            places = offsets[index, panel.start : panel.stop + 1]
            torch.ops.persona_native.subtract_removed(part, weight_panel, columns, places, 1 - gamma, y[rows, panel])
    return y if order is None else torch.empty_like(y).index_copy_(0, order, y)


def _transposed(x: Tensor) -> Tensor:
    """float32 ``[K, ROWS_ASIDE]``, zeros behind the last row."""
    part = torch.zeros(x.shape[1], ROWS_ASIDE)
    part[:, : x.shape[0]] = x.T
    return part
