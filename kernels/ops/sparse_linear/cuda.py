"""The sparse product in CUDA (``csrc/sparse_linear/cuda.cu``), half precision: tensor cores for few rows of x, dense
products of expanded panels for many.

What it has no kernel for goes to the next backend (Triton's): float32, and columns that are no whole mask words.
"""

import torch
from torch import Tensor

from kernels import backends
from kernels.ops.masked_linear.cuda import half_in_words, rows_at_16
from kernels.ops.sparse_linear.cpp import by_panels

MOST_ROWS = 16
PANEL_BYTES = 32 << 20
"""Of the expanded weight: as for the gated panels of the masked product, the launches count."""


def sparse_linear_cuda(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See ``kernels.ops.sparse_linear``. Never waits for the device."""
    values, bits, offsets = values.contiguous(), bits.contiguous(), offsets.contiguous()
    if not served(x, values, bits):
        return backends.after("sparse_linear", "cuda", x.device.type)(x, values, bits, offsets, bias)
    y = x.new_empty(x.shape[0], bits.shape[0])
    if y.numel() == 0:
        return y
    if x.shape[0] <= MOST_ROWS:
        torch.ops.persona_native.sparse_linear(x, values, bits, offsets, bias, y)
        return y
    by_panels(x, values, bits, offsets, bias, y, PANEL_BYTES)
    return y


def served(x: Tensor, values: Tensor, bits: Tensor) -> bool:
    """Whether the kernels can read these: half precision, whole mask words, rows at multiples of 16 bytes."""
    return (
        half_in_words(x)
        and (rows_at_16(x) or x.shape[0] > MOST_ROWS)
        and values.data_ptr() % 16 == bits.data_ptr() % 4 == 0
    )
