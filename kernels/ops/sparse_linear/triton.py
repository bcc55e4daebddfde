"""The sparse product in Triton: where a kept value lies is found by counting the mask bits before it.

A group is eight columns of a weight row, the bits of one mask byte. Its values begin behind those of all groups before
it: a running count over the blocks of a row, a scan over a block's groups, and within a byte a count of the lower bits.
``_row_kernel`` multiplies and adds for one row of x; ``_tile_kernel`` feeds tensor cores. Both add up in float32, and
the weight with its zeros exists in registers only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.masked_linear.triton import multiply_add, tile_of
from kernels.ops.sparse_linear.reference import sparse_linear_reference

ROW_BLOCK = {"BLOCK_N": 1, "BLOCK_G": 128, "num_warps": 1}


@triton.jit
def _ones(byte):
    """The number of bits that are set in ``byte``, int32 below 256."""
    pairs = byte - ((byte >> 1) & 0x55)
    quads = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (quads + (quads >> 4)) & 0x0F


@triton.jit
def _extent(offsets_ptr, stride_on, n, N):
    """Where the values of rows ``n`` begin, int64, and how many there are, int32; none outside."""
    places = offsets_ptr + n.to(tl.int64) * stride_on
    first = tl.load(places, n < N, 0)
    return first, (tl.load(places + stride_on, n < N, 0) - first).to(tl.int32)


@triton.jit
def _expanded(values_ptr, bits_ptr, stride_bn, stride_bb, n, group, N, K, first, length, passed):
    """The weight ``[BLOCK_N, BLOCK_G, 8]`` of rows ``n`` and groups of eight columns, 0 where removed or outside.

    A row's values lie at ``first`` to ``first + length``; ``passed`` of them belong to earlier groups. Returns their
    number behind these groups too.
    """
    read = (n < N)[:, None] & (group * 8 < K)[None, :]
    offsets = n.to(tl.int64)[:, None] * stride_bn + group.to(tl.int64)[None, :] * stride_bb
    byte = tl.load(bits_ptr + offsets, read, 0).to(tl.int32)
    count = _ones(byte)
    bit = tl.arange(0, 8)[None, None, :]
    lower = _ones(byte[:, :, None] & ((1 << bit) - 1))
    place = (passed[:, None] + tl.cumsum(count, 1) - count)[:, :, None] + lower
    # Bits that say more than the offsets read nothing of the next row.
    kept = ((byte[:, :, None] >> bit) & 1 != 0) & (place < length[:, None, None])
    weight = tl.load((values_ptr + first)[:, None, None] + place, kept, 0)
    return weight, passed + tl.sum(count, 1)


@triton.jit
def _row_kernel(
    x_ptr, values_ptr, bits_ptr, offsets_ptr, bias_ptr, y_ptr, stride_xm, stride_xk, stride_bn, stride_bb, stride_on,
    stride_bias, M, N, K, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``y[m, n]`` for one row m and ``BLOCK_N`` columns n."""
    m = (tl.program_id(0) % M).to(tl.int64)
    n = tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    first, length = _extent(offsets_ptr, stride_on, n, N)
    passed = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_G, 8), tl.float32)
    for start in range(0, tl.cdiv(K, 8), BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        weight, passed = _expanded(values_ptr, bits_ptr, stride_bn, stride_bb, n, group, N, K, first, length, passed)
        columns = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + m * stride_xm + columns.to(tl.int64) * stride_xk, columns < K, 0).to(tl.float32)
        total += weight.to(tl.float32) * x[None, :, :]
    y = tl.sum(tl.sum(total, 2), 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n.to(tl.int64) * stride_bias, n < N, 0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)


@triton.jit
def _tile_kernel(
    x_ptr, values_ptr, bits_ptr, offsets_ptr, bias_ptr, y_ptr, stride_xm, stride_xk, stride_bn, stride_bb, stride_on,
    stride_bias, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[m, n]`` for a tile: ``y^T = W x^T``, with the expanded weight from registers as the left factor."""
    m = tl.program_id(0) % tl.cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tl.cdiv(M, BLOCK_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_m = m.to(tl.int64)
    first, length = _extent(offsets_ptr, stride_on, n, N)
    passed = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    lost = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        group = start // 8 + tl.arange(0, BLOCK_K // 8)
        weight, passed = _expanded(values_ptr, bits_ptr, stride_bn, stride_bb, n, group, N, K, first, length, passed)
        k = start + tl.arange(0, BLOCK_K)
        read = (k < K)[:, None] & (m < M)[None, :]
        x = tl.load(x_ptr + wide_m[None, :] * stride_xm + k.to(tl.int64)[:, None] * stride_xk, read, 0)
        total, lost = multiply_add(weight.reshape(BLOCK_N, BLOCK_K), x, total, lost)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n.to(tl.int64) * stride_bias, n < N, 0).to(tl.float32)[:, None]
    place = wide_m[None, :] * N + n[:, None]
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), (m < M)[None, :] & (n < N)[:, None])


def use_rows(rows: int) -> bool:
    """Whether every row of x is multiplied on its own: with more than one, a tile expands the weight once for all."""
    return rows == 1


def sparse_linear_triton(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See ``kernels.ops.sparse_linear``. Never waits for the device."""
    if x.dtype == torch.float64:
        # For checks, not for speed: tensor cores are narrower.
        return sparse_linear_reference(x, values, bits, offsets, bias)
    (M, K), N = x.shape, bits.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    arguments = (
        x, values.contiguous(), bits, offsets, bias, y, *x.stride(), *bits.stride(), offsets.stride(0),
        0 if bias is None else bias.stride(0), M, N, K,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        if use_rows(M):
            _row_kernel[(M * triton.cdiv(N, ROW_BLOCK["BLOCK_N"]),)](*arguments, **ROW_BLOCK)
        else:
            tile = tile_of(M, x.dtype)
            _tile_kernel[(triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)](*arguments, **tile)
    return y
