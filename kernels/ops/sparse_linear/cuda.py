"""The sparse product in CUDA (``csrc/sparse_linear/cuda.cu``), half precision: tensor cores for few rows of x, dense
products of expanded panels for many.

What it has no kernel for goes to the next backend (Triton's): float32, and columns that are no whole mask words.
"""

import torch
from torch import Tensor

from kernels import backends
from kernels.ops.masked_linear.cpp import dense_product
from kernels.ops.masked_linear.cuda import rows_at_16

MOST_ROWS = 16
PANEL_BYTES = 32 << 20
"""Of the expanded weight: as for the gated panels of the masked product, the launches count."""


def sparse_linear_cuda(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See ``kernels.ops.sparse_linear``. Never waits for the device."""
    (M, K), N = x.shape, bits.shape[0]
    values, bits, offsets = values.contiguous(), bits.contiguous(), offsets.contiguous()
    if not served(x, values, bits):
        return backends.after("sparse_linear", "cuda", x.device.type)(x, values, bits, offsets, bias)
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    if M <= MOST_ROWS:
        torch.ops.persona_native.sparse_linear(x, values, bits, offsets, bias, y)
        return y
    most = max(128, PANEL_BYTES // (K * x.element_size()) // 128 * 128)
    panel = torch.empty(min(most, N), K, dtype=values.dtype, device=values.device)
    for first in range(0, N, most):
        dense = panel[: N - first]
        torch.ops.persona_native.expand_rows(values, bits, offsets, first, dense)
        dense_product(x, dense, None if bias is None else bias[first : first + most], y[:, first : first + most])
    return y


def served(x: Tensor, values: Tensor, bits: Tensor) -> bool:
    """Whether the kernels can read these: half precision, whole mask words, rows at multiples of 16 bytes."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and 0 < x.shape[1] == x.shape[1] // 32 * 32
        and (rows_at_16(x) or x.shape[0] > MOST_ROWS)
        and values.data_ptr() % 16 == bits.data_ptr() % 4 == 0
    )
