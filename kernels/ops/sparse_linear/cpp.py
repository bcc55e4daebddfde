"""The sparse product in C++ (``csrc/sparse_linear``), and dense products of panels where torch's are faster."""

import torch
from torch import Tensor

from kernels.ops.masked_linear.cpp import FEW_ROWS, PANEL_BYTES, dense_product, most_rows, panel_rows
from kernels.ops.sparse_linear.reference import sparse_linear_reference


def sparse_linear_cpp(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See ``kernels.ops.sparse_linear``."""
    if x.dtype == torch.float64:
        # For checks, not for speed: the kernels add up in float32.
        return sparse_linear_reference(x, values, bits, offsets, bias)
    values, bits, offsets = values.contiguous(), bits.contiguous(), offsets.contiguous()
    y = torch.empty(x.shape[0], bits.shape[0], dtype=x.dtype)
    if x.shape[0] <= FEW_ROWS or x.shape[0] <= most_rows(x.dtype):
        torch.ops.persona_native.sparse_linear(x, values, bits, offsets, bias, y)
        return y
    # As torch's products are faster with wide panels there: see `masked_linear.cpp.use_direct`.
    by_panels(x, values, bits, offsets, bias, y, PANEL_BYTES)
    return y


def by_panels(
    x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None, y: Tensor, panel_bytes: int
) -> None:
    """Dense products into y, with a panel of the expanded weight at a time."""
    dense = None
    for panel in panel_rows(bits.shape[0], x.shape[1] * x.element_size(), panel_bytes):
        # The first panel is the largest.
        count = panel.stop - panel.start
        dense = x.new_empty(count, x.shape[1]) if dense is None else dense[:count]
        torch.ops.persona_native.expand_rows(values, bits, offsets, panel.start, dense)
        dense_product(x, dense, None if bias is None else bias[panel], y[:, panel])
