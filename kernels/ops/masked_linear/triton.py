"""The masked product in Triton: the packed mask gates the weight between its load and its use.

``_row_kernel`` multiplies and adds for one row of x. Many rows of one persona: ``_gate_kernel`` writes a panel of the
gated weight for the vendor's dense product. Many rows of several: ``_tile_kernel`` feeds tensor cores, and
``_sum_kernel`` adds up its parts. All read eight columns of a weight row as one group, the bits of one mask byte, and
add up in float32. Block sizes and borders were measured on an H200 (docs/kernels-gpu.md).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.masked_linear.cpp import dense_product
from kernels.ops.masked_linear.reference import check_personas, masked_linear_reference

MOST_ROWS_APART, MOST_ROWS_ALIKE = 16, 3
"""Rows of x for the row kernel: with a persona each, and all of one."""
ROW_BLOCK = {"BLOCK_N": 1, "BLOCK_G": 64, "num_warps": 1}
PANEL_BYTES, GATE_GROUPS = 32 << 20, 256
"""Of a panel of the gated weight, and groups of columns in a program that gates it."""
PROGRAMS, LEAST_COLUMNS = 4, 256
"""Programs that the tile kernel should have for each multiprocessor, and columns that are worth one."""
SUM_BLOCK = 1024


@triton.jit
def _weight(weight_ptr, stride_wn, stride_wk, n, group, N, K):
    """The weight ``[BLOCK_N, BLOCK_G, 8]`` of rows ``n`` and groups of eight columns; 0 outside."""
    columns = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (n < N)[:, None, None] & (columns < K)[None, :, :]
    offsets = n.to(tl.int64)[:, None, None] * stride_wn + columns.to(tl.int64)[None, :, :] * stride_wk
    return tl.load(weight_ptr + offsets, inside, 0)


@triton.jit
def _gated(weight, bits_ptr, stride_bn, stride_bb, n, group, N, K, masked, gamma, SOFT: tl.constexpr):
    """``W * G`` of what ``_weight`` gave, in its dtype; the plain weight where ``masked`` is False, whatever
    ``bits_ptr`` is."""
    read = (n < N)[:, None] & (group * 8 < K)[None, :] & masked
    offsets = n.to(tl.int64)[:, None] * stride_bn + group.to(tl.int64)[None, :] * stride_bb
    bits = tl.load(bits_ptr + offsets, read, 0xFF).to(tl.int32)
    kept = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1 != 0
    if SOFT:
        return tl.where(kept, weight, (weight.to(tl.float32) * gamma).to(weight.dtype))
    # A product with a gamma of 0 would let infinity and NaN through.
    return tl.where(kept, weight, 0.0)


@triton.jit
def _row_kernel(
    x_ptr, weight_ptr, bits_ptr, persona_ptr, bias_ptr, y_ptr, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_bp, stride_bn, stride_bb, stride_pm, stride_bias, M, N, K, P, gamma,
    SOFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
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
        weight = _weight(weight_ptr, stride_wn, stride_wk, n, group, N, K).to(tl.float32)
        weight = _gated(weight, bits_ptr, stride_bn, stride_bb, n, group, N, K, masked, gamma, SOFT)
        columns = group[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + m * stride_xm + columns.to(tl.int64) * stride_xk, columns < K, 0).to(tl.float32)
        total += weight * x[None, :, :]
    y = tl.sum(tl.sum(total, 2), 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n.to(tl.int64) * stride_bias, n < N, 0).to(tl.float32)
    y = tl.where(exists, y, float("nan"))
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), n < N)


@triton.jit
def _gate_kernel(
    weight_ptr, bits_ptr, persona_ptr, out_ptr, stride_wn, stride_wk, stride_bp, stride_bn, stride_bb, N, K, P, gamma,
    SOFT: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``W * G`` of one row of the weight and ``BLOCK_G`` groups of columns, for the first persona; NaN if there is no
    such persona."""
    across = tl.cdiv(tl.cdiv(K, 8), BLOCK_G)
    n = tl.program_id(0) // across + tl.arange(0, 1)
    group = tl.program_id(0) % across * BLOCK_G + tl.arange(0, BLOCK_G)
    persona = tl.load(persona_ptr)
    bits_ptr += tl.where((persona >= 0) & (persona < P), persona, 0).to(tl.int64) * stride_bp
    weight = _weight(weight_ptr, stride_wn, stride_wk, n, group, N, K)
    gated = _gated(weight, bits_ptr, stride_bn, stride_bb, n, group, N, K, persona >= 0, gamma, SOFT)
    gated = tl.where((persona >= -1) & (persona < P), gated, float("nan"))
    columns = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    place = n.to(tl.int64)[:, None, None] * K + columns[None, :, :]
    tl.store(out_ptr + place, gated, (columns < K)[None, :, :])


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
    x_ptr, weight_ptr, bits_ptr, persona_ptr, part_ptr, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_bp, stride_bn, stride_bb, stride_pm, M, N, K, P, gamma, splits, span,
    SOFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums ``[splits, M, N]`` of ``y[m, n]`` for a tile over the ``span`` columns of one split.

    The weight is the left factor, ``y^T = (W * G) x^T``: it comes through registers, from where tensor cores
    take their left factor, and the tile may be narrow along m. A block of it is loaded once and gated for every
    persona among the tile's rows.
    """
    across = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % across * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) // across % splits
    n = tl.program_id(0) // across // splits * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_m = m.to(tl.int64)
    # Absent rows carry the smallest number: they are done from the start.
    persona = tl.load(persona_ptr + wide_m * stride_pm, m < M, -2)
    exists = (persona >= -1) & (persona < P)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    lost = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.max(tl.where(exists, persona, -2))
    for start in range(split * span, tl.minimum(K, (split + 1) * span), BLOCK_K):
        group = start // 8 + tl.arange(0, BLOCK_K // 8)
        k = start + tl.arange(0, BLOCK_K)
        weight = _weight(weight_ptr, stride_wn, stride_wk, n, group, N, K)
        read = (k < K)[:, None] & (m < M)[None, :]
        x = tl.load(x_ptr + wide_m[None, :] * stride_xm + k.to(tl.int64)[:, None] * stride_xk, read, 0)
        waiting = tl.where(exists, persona, -2)
        current = first
        while current >= -1:
            mask_ptr = bits_ptr + tl.maximum(current, 0).to(tl.int64) * stride_bp
            gated = _gated(weight, mask_ptr, stride_bn, stride_bb, n, group, N, K, current >= 0, gamma, SOFT)
            # The rows of other personas are 0 in this pass, so that the passes add up.
            own = tl.where((waiting == current)[None, :], x, 0.0)
            total, lost = multiply_add(gated.reshape(BLOCK_N, BLOCK_K), own, total, lost)
            waiting = tl.where(waiting == current, -2, waiting)
            current = tl.max(waiting)
    total = tl.where(exists[None, :], total, float("nan"))
    place = (split.to(tl.int64) * M + wide_m[None, :]) * N + n[:, None]
    tl.store(part_ptr + place, total, (m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _sum_kernel(part_ptr, bias_ptr, y_ptr, stride_bias, MN, N, splits, BLOCK: tl.constexpr):
    """``y`` ``[M, N]`` from the sums of all splits, always in the same order, and the bias."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + split * MN + place, place < MN, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + place % N * stride_bias, place < MN, 0).to(tl.float32)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), place < MN)


def use_rows(rows: int, apart: bool) -> bool:
    """Whether every row of x is multiplied on its own.

    Not where a tile makes fewer passes over the weight, or a dense product of the gated weight is faster.
    """
    return rows <= (MOST_ROWS_APART if apart else MOST_ROWS_ALIKE)


def tile_of(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps of the tile kernels; they spill on none of sm_80, sm_90 and sm_100.

    From 64 rows of the left factor on, Triton 3.7 multiplies float32 in tf32 on sm_100, whatever precision was
    asked for: with 32 it does not.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}
    return {"BLOCK_M": 16 if rows <= 16 else 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}


def splits_of(tiles: int, columns: int, processors: int) -> int:
    """In how many parts the columns are added up: enough programs for ``processors``, each with ``LEAST_COLUMNS``."""
    return max(1, min(-(-PROGRAMS * processors // tiles), columns // LEAST_COLUMNS))


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
    by_rows = use_rows(M, apart) or K == 0
    if not apart and not by_rows:
        return by_panels(x, weight, bits, persona, gamma, bias, y)
    strides = (*x.stride(), *weight.stride(), *bits.stride(), stride_pm)
    with torch.cuda.device_of(x):
        if by_rows:
            _row_kernel[(M * triton.cdiv(N, ROW_BLOCK["BLOCK_N"]),)](
                x, weight, bits, persona, bias, y, *strides, stride_bias, M, N, K, bits.shape[0], gamma,
                SOFT=gamma != 0, **ROW_BLOCK,
            )  # fmt: skip
            return y
        tile = tile_of(M, x.dtype)
        tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
        splits = splits_of(tiles, K, processors_of(x.device))
        span = triton.cdiv(triton.cdiv(K, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
        part = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
        _tile_kernel[(tiles * splits,)](
            x, weight, bits, persona, part, *strides, M, N, K, bits.shape[0], gamma, splits, span,
            SOFT=gamma != 0, **tile,
        )  # fmt: skip
        _sum_kernel[(triton.cdiv(M * N, SUM_BLOCK),)](part, bias, y, stride_bias, M * N, N, splits, BLOCK=SUM_BLOCK)
    return y


def by_panels(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None, y: Tensor
) -> Tensor:
    """The vendor's dense product with a panel of the gated weight at a time. One persona, and a column at least."""
    N, K = weight.shape
    most = max(1, PANEL_BYTES // (K * weight.element_size()) // 128 * 128 or 128)
    panel = torch.empty(min(most, N), K, dtype=weight.dtype, device=weight.device)
    for first in range(0, N, most):
        some, masks = weight[first : first + most], bits[:, first : first + most]
        gated = panel[: some.shape[0]]
        with torch.cuda.device_of(x):
            _gate_kernel[(some.shape[0] * triton.cdiv(triton.cdiv(K, 8), GATE_GROUPS),)](
                some, masks, persona, gated, *some.stride(), *masks.stride(), some.shape[0], K, bits.shape[0],
                gamma, SOFT=gamma != 0, BLOCK_G=GATE_GROUPS, num_warps=4,
            )  # fmt: skip
        dense_product(x, gated, None if bias is None else bias[first : first + most], y[:, first : first + most])
    return y


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; as many as a large one has, where the interpreter runs."""
    if device.type != "cuda":
        return 128
    return torch.cuda.get_device_properties(device).multi_processor_count
