"""The masked product in Triton: the packed mask gates the weight between its load and its use.

``_row_kernel`` multiplies and adds for one row of x; ``_tile_kernel`` feeds tensor cores. Both read eight
columns of a weight row as one group, the bits of one mask byte, and add up in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.masked_linear.reference import check_personas, masked_linear_reference

# With a persona for every row, up to so many rows each read the weight for themselves (from the L2 cache).
MOST_ROWS_APART = 16
ROW_BLOCK = {"BLOCK_N": 8, "BLOCK_G": 64, "num_warps": 4}


@triton.jit
def _gated(
    weight_ptr, bits_ptr, stride_wn, stride_wk, stride_bn, stride_bb, n, group, N, K, masked, gamma,
    KIND: tl.constexpr,
):  # fmt: skip
    """``W * G`` ``[BLOCK_N, BLOCK_G, 8]`` in ``KIND`` for rows ``n`` and groups of eight columns; 0 outside.

    ``masked`` False: the plain weight, whatever ``bits_ptr`` is.
    """
    columns = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (n < N)[:, None, None] & (columns < K)[None, :, :]
    offsets = n.to(tl.int64)[:, None, None] * stride_wn + columns.to(tl.int64)[None, :, :] * stride_wk
    weight = tl.load(weight_ptr + offsets, inside, 0)
    read = (n < N)[:, None] & (group * 8 < K)[None, :] & masked
    offsets = n.to(tl.int64)[:, None] * stride_bn + group.to(tl.int64)[None, :] * stride_bb
    bits = tl.load(bits_ptr + offsets, read, 0xFF).to(tl.int32)
    kept = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1 != 0
    weight = weight.to(tl.float32)
    # A product with a gamma of 0 would let infinity and NaN through.
    removed = tl.where(gamma == 0, 0.0, weight * gamma)
    return tl.where(kept, weight, removed).to(KIND)


@triton.jit
def _row_kernel(
    x_ptr, weight_ptr, bits_ptr, persona_ptr, bias_ptr, y_ptr, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_bp, stride_bn, stride_bb, stride_pm, stride_bias, M, N, K, P, gamma,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``y[m, n]`` for one row m and ``BLOCK_N`` columns n; neighbouring programs share the weight's block."""
    m = (tl.program_id(0) % M).to(tl.int64)
    n = tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    persona = tl.load(persona_ptr + m * stride_pm)
    exists = (persona >= -1) & (persona < P)
    masked = exists & (persona >= 0)
    bits_ptr += tl.where(masked, persona, 0).to(tl.int64) * stride_bp
    total = tl.zeros((BLOCK_N, BLOCK_G, 8), tl.float32)
    for start in range(0, tl.cdiv(K, 8), BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        weight = _gated(
            weight_ptr, bits_ptr, stride_wn, stride_wk, stride_bn, stride_bb, n, group, N, K, masked, gamma, tl.float32
        )
        columns = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + m * stride_xm + columns.to(tl.int64) * stride_xk, columns < K, 0).to(tl.float32)
        total += weight * x[None, :, :]
    y = tl.sum(tl.sum(total, 2), 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n.to(tl.int64) * stride_bias, n < N, 0).to(tl.float32)
    y = tl.where(exists, y, float("nan"))
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)


@triton.jit
def multiply_add(weight, x, total, lost):
    """``total + weight x`` of a block of columns, and what the sum has lost to rounding so far (``lost`` before).

    One running sum over all columns is several times less accurate in float32 than a vendor's product, which has many;
    with what each block loses given back to the next it is as accurate. Half precision rounds the result alone.
    """
    if x.dtype == tl.float32:
        block = tl.dot(weight, x, input_precision="ieee") - lost
        before = total
        total = before + block
        lost = (total - before) - block
        # An infinite sum has lost nothing that could be named.
        lost = tl.where(lost == lost, lost, 0.0)
    else:
        total = tl.dot(weight, x, total)
    return total, lost


@triton.jit
def _tile_kernel(
    x_ptr, weight_ptr, bits_ptr, persona_ptr, bias_ptr, y_ptr, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_bp, stride_bn, stride_bb, stride_pm, stride_bias, M, N, K, P, gamma,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[m, n]`` for a tile, one pass over the weight's block for each persona among the tile's rows.

    The weight is the left factor, ``y^T = (W * G) x^T``: it comes through registers, from where tensor cores
    take their left factor, and the tile may be narrow along m.
    """
    m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tl.cdiv(M, BLOCK_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_m = m.to(tl.int64)
    # Absent rows carry the smallest number: they are done from the start.
    persona = tl.load(persona_ptr + wide_m * stride_pm, m < M, -2)
    exists = (persona >= -1) & (persona < P)
    waiting = tl.where(exists, persona, -2)
    current = tl.max(waiting)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    lost = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    while current >= -1:
        masked = current >= 0
        mask_ptr = bits_ptr + tl.where(masked, current, 0).to(tl.int64) * stride_bp
        for start in range(0, K, BLOCK_K):
            group = start // 8 + tl.arange(0, BLOCK_K // 8)
            weight = _gated(
                weight_ptr, mask_ptr, stride_wn, stride_wk, stride_bn, stride_bb, n, group, N, K, masked, gamma,
                weight_ptr.dtype.element_ty,
            )  # fmt: skip
            k = start + tl.arange(0, BLOCK_K)
            # The rows of other personas are 0 in this pass, so that the passes add up.
            read = (k < K)[:, None] & (waiting == current)[None, :]
            x = tl.load(x_ptr + wide_m[None, :] * stride_xm + k.to(tl.int64)[:, None] * stride_xk, read, 0)
            total, lost = multiply_add(weight.reshape(BLOCK_N, BLOCK_K), x, total, lost)
        waiting = tl.where(waiting == current, -2, waiting)
        current = tl.max(waiting)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n.to(tl.int64) * stride_bias, n < N, 0).to(tl.float32)[:, None]
    y = tl.where(exists[None, :], total, float("nan")).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + wide_m[None, :] * N + n[:, None], y, (m < M)[None, :] & (n < N)[:, None])


def use_rows(rows: int, apart: bool) -> bool:
    """Whether every row of x is multiplied on its own.

    One row has nothing to share, and few rows with personas of their own share no gated weight; a tile
    would make a pass for each persona. The border is by the count of bytes, not measured.
    """
    return rows == 1 or (apart and rows <= MOST_ROWS_APART)


def tile_of(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps of the tile kernel, the largest that spill on none of sm_80, sm_90 and sm_100.

    From 64 rows of the left factor on, Triton 3.7 multiplies float32 in tf32 on sm_100, whatever precision was
    asked for: with 32 it does not.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
    if rows <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}


def launch(
    kernels: tuple[Any, Any], row_block: dict[str, int], by_rows: bool, x: Tensor, N: int, arguments: tuple[Any, ...]
) -> None:
    """Run the first of ``kernels`` in blocks of ``row_block``, each for one row of ``x``; or the second in tiles."""
    M = x.shape[0]
    with torch.cuda.device_of(x):
        if by_rows:
            kernels[0][(M * triton.cdiv(N, row_block["BLOCK_N"]),)](*arguments, **row_block)
        else:
            tile = tile_of(M, x.dtype)
            grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
            kernels[1][grid](*arguments, **tile)


def masked_linear_triton(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.masked_linear``. Never waits for the device."""
    if x.dtype == torch.float64:
        # For checks of gradients, not for speed: tensor cores and gamma are narrower.
        return masked_linear_reference(x, weight, bits, persona, gamma, bias)
    if persona.device.type == "cpu":
        check_personas(persona, bits.shape[0])
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    apart = persona.shape[0] > 1
    stride_pm = persona.stride(0) if apart else 0
    stride_bias = 0 if bias is None else bias.stride(0)
    arguments = (
        x, weight, bits, persona, bias, y, *x.stride(), *weight.stride(), *bits.stride(), stride_pm, stride_bias,
        M, N, K, bits.shape[0], gamma,
    )  # fmt: skip
    launch((_row_kernel, _tile_kernel), ROW_BLOCK, use_rows(M, apart), x, N, arguments)
    return y
