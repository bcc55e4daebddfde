"""The correction form in Triton: the vendor's dense product, less the products of the listed weights.

A program takes one row of x and a block of weight rows, and gathers the weights and inputs that the row's persona
removes, by the lists of its weight rows: as many steps as the longest of them needs. Sums are float32; the dense
product has been rounded to the dtype of x before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.ops.correction_linear.reference import correction_linear_reference
from kernels.ops.masked_linear.reference import check_personas

BLOCK = {"BLOCK_N": 32, "BLOCK_R": 32, "num_warps": 4}


@triton.jit
def _subtract_kernel(
    x_ptr, weight_ptr, columns_ptr, offsets_ptr, persona_ptr, y_ptr, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_c, stride_op, stride_on, stride_pm, M, N, K, P, scale, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y[m, n] -= scale * sum_k W[n, k] x[m, k]`` over the listed k; NaN for a persona that does not exist."""
    m = (tl.program_id(0) % M).to(tl.int64)
    n = tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_n = n.to(tl.int64)
    persona = tl.load(persona_ptr + m * stride_pm)
    exists = (persona >= -1) & (persona < P)
    masked = exists & (persona >= 0)
    listed = (n < N) & masked
    offsets_ptr += tl.where(masked, persona, 0).to(tl.int64) * stride_op
    first = tl.load(offsets_ptr + wide_n * stride_on, listed, 0)
    length = tl.load(offsets_ptr + (wide_n + 1) * stride_on, listed, 0) - first
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, tl.max(length), BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)[None, :]
        inside = place < length[:, None]
        k = tl.load(columns_ptr + (first[:, None] + place).to(tl.int64) * stride_c, inside, 0).to(tl.int64)
        # A column that does not exist reads no memory outside the weight.
        inside = inside & (k < K)
        weight = tl.load(weight_ptr + wide_n[:, None] * stride_wn + k * stride_wk, inside, 0).to(tl.float32)
        total += weight * tl.load(x_ptr + m * stride_xm + k * stride_xk, inside, 0).to(tl.float32)
    y = tl.load(y_ptr + m * N + n, n < N, 0).to(tl.float32) - scale * tl.sum(total, 1)
    y = tl.where(exists, y, float("nan"))
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)


def correction_linear_triton(
    x: Tensor, weight: Tensor, columns: Tensor, offsets: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.correction_linear``. Never waits for the device."""
    if x.dtype == torch.float64:
        # For checks, not for speed: the sums are narrower.
        return correction_linear_reference(x, weight, columns, offsets, persona, gamma, bias)
    if persona.device.type == "cpu":
        check_personas(persona, offsets.shape[0], "correction_linear")
    (M, K), N = x.shape, weight.shape[0]
    y = F.linear(x, weight, bias).contiguous()
    if y.numel() == 0:
        return y
    stride_pm = persona.stride(0) if persona.shape[0] > 1 else 0
    with torch.cuda.device_of(x):
        _subtract_kernel[(M * triton.cdiv(N, BLOCK["BLOCK_N"]),)](
            x, weight, columns, offsets, persona, y, *x.stride(), *weight.stride(), columns.stride(0),
            *offsets.stride(), stride_pm, M, N, K, offsets.shape[0], 1 - gamma, **BLOCK,
        )  # fmt: skip
    return y
