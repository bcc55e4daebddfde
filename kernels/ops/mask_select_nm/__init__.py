"""N:M mask selection: keep the ``n`` best of every ``m`` consecutive weights of a row."""

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.mask_select_nm.cpp import mask_select_nm_cpp
from kernels.ops.mask_select_nm.reference import mask_select_nm_reference

GROUPS = (2, 4, 8)
"""Sizes of a group: those that fill whole bytes of a packed mask, and that hardware knows."""


@torch.library.custom_op("persona::mask_select_nm", mutates_args=())
def mask_select_nm(weight: Tensor, channel_score: Tensor, n: int, m: int) -> Tensor:
    """Keep, in every group of ``m`` consecutive columns, the ``n`` weights with the largest ``|W_ij| * a_j``.

    Args:
        weight: ``[N, K]``, float32, bfloat16, float16 or float64; K a multiple of ``m``.
        channel_score: ``a`` ``[K]``, float32, not negative.
        n: how many weights stay in each group, 0..m. Equal scores go to the lower column.
        m: the size of a group: 2, 4 or 8 (2:4 and 4:8 are ``n=2, m=4`` and ``n=4, m=8``).

    Returns:
        Packed mask uint8 ``[N, ceil(K / 8)]``, True = kept.

    Scores as in ``mask_select``. Raises ValueError on NaN or infinity in a score.
    """
    op = "mask_select_nm"
    checks.dtype(op, "weight", weight, checks.FLOATS)
    checks.shape(op, "weight", weight, (None, None), "[N, K]")
    checks.dtype(op, "channel_score", channel_score, (torch.float32,))
    checks.shape(op, "channel_score", channel_score, (weight.shape[1],), "[K]")
    checks.same_device(op, weight=weight, channel_score=channel_score)
    if m not in GROUPS:
        raise ValueError(f"{op}: m must be one of {', '.join(map(str, GROUPS))}, got {m}")
    if weight.shape[1] % m:
        raise ValueError(f"{op}: K must be a multiple of m = {m}, got {checks.describe(weight)}")
    checks.in_range(op, "n", n, 0, m)
    return backends.implementation(op, weight.device.type)(weight, channel_score, n, m)


@mask_select_nm.register_fake
def _(weight: Tensor, channel_score: Tensor, n: int, m: int) -> Tensor:
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 7) // 8), dtype=torch.uint8)


backends.register("mask_select_nm", "reference", mask_select_nm_reference)
native.register("mask_select_nm", mask_select_nm_cpp)
triton_backend.register("mask_select_nm", "kernels.ops.mask_select_nm.triton", "mask_select_nm_triton")
