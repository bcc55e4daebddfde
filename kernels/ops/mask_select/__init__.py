"""Row-wise mask selection: keep the ``keep`` best weights of every row, ties to the lower column."""

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.mask_select.cpp import mask_select_cpp, mask_select_scores_cpp
from kernels.ops.mask_select.reference import mask_select_reference, mask_select_scores_reference


@torch.library.custom_op("persona::mask_select", mutates_args=())
def mask_select(weight: Tensor, channel_score: Tensor, keep: int) -> Tensor:
    """Keep, in every row, the ``keep`` weights with the largest ``|W_ij| * a_j``.

    Args:
        weight: ``[N, K]``, float32, bfloat16, float16 or float64.
        channel_score: ``a`` ``[K]``, float32, not negative.
        keep: how many weights stay in each row, 0..K. Equal scores go to the lower column.

    Returns:
        Packed mask uint8 ``[N, ceil(K / 8)]``, True = kept.

    The score is the float32 product of ``|W|`` and ``a`` rounded once, so that every backend
    ranks the same numbers. Raises ValueError on NaN or infinity in a score.
    """
    op = "mask_select"
    checks.dtype(op, "weight", weight, checks.FLOATS)
    checks.shape(op, "weight", weight, (None, None), "[N, K]")
    checks.dtype(op, "channel_score", channel_score, (torch.float32,))
    checks.shape(op, "channel_score", channel_score, (weight.shape[1],), "[K]")
    checks.same_device(op, weight=weight, channel_score=channel_score)
    checks.in_range(op, "keep", keep, 0, weight.shape[1])
    return backends.implementation(op, weight.device.type)(weight, channel_score, keep)


@mask_select.register_fake
def _(weight: Tensor, channel_score: Tensor, keep: int) -> Tensor:
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("persona::mask_select_scores", mutates_args=())
def mask_select_scores(scores: Tensor, keep: int, tiebreak: Tensor | None = None) -> Tensor:
    """Keep, in every row of ``scores`` ``[N, K]`` (float32), the ``keep`` largest.

    Equal scores are ranked by ``tiebreak`` ``[N, K]`` (float32) where given, and what is still
    equal goes to the lower column. Returns packed bits uint8 ``[N, ceil(K / 8)]``. Minus infinity
    is allowed (ranked last); NaN and plus infinity raise ValueError.
    """
    op = "mask_select_scores"
    checks.dtype(op, "scores", scores, (torch.float32,))
    checks.shape(op, "scores", scores, (None, None), "[N, K]")
    if tiebreak is not None:
        checks.dtype(op, "tiebreak", tiebreak, (torch.float32,))
        checks.shape(op, "tiebreak", tiebreak, tuple(scores.shape), "[N, K]")
        checks.same_device(op, scores=scores, tiebreak=tiebreak)
    checks.in_range(op, "keep", keep, 0, scores.shape[1])
    return backends.implementation(op, scores.device.type)(scores, keep, tiebreak)


@mask_select_scores.register_fake
def _(scores: Tensor, keep: int, tiebreak: Tensor | None = None) -> Tensor:
    return scores.new_empty((scores.shape[0], (scores.shape[1] + 7) // 8), dtype=torch.uint8)


backends.register("mask_select", "reference", mask_select_reference)
backends.register("mask_select_scores", "reference", mask_select_scores_reference)
native.register("mask_select", mask_select_cpp, cuda=mask_select_cpp)
native.register("mask_select_scores", mask_select_scores_cpp, cuda=mask_select_scores_cpp)
triton_backend.register("mask_select", "kernels.ops.mask_select.triton", "mask_select_triton")
triton_backend.register("mask_select_scores", "kernels.ops.mask_select.triton", "mask_select_scores_triton")
