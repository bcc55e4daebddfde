"""One threshold for whole matrices: the best ``keep`` scores of one matrix, or of several together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.mask_select_global.cpp import mask_select_global_cpp, mask_select_threshold_cpp
from kernels.ops.mask_select_global.reference import mask_select_global_reference, mask_select_threshold_reference


@torch.library.custom_op("persona::mask_select_threshold", mutates_args=())
def mask_select_threshold(scores: Tensor, threshold: float, ties: int = 0) -> Tensor:
    """Keep every score above ``threshold``, and the first ``ties`` equal to it in row-major order.

    Args:
        scores: ``[N, K]``, float32. Minus infinity is allowed; NaN and plus infinity raise ValueError.
        threshold: rounded to float32.
        ties: how many of the equal scores stay at most.

    Returns:
        Packed mask uint8 ``[N, ceil(K / 8)]``, True = kept. Rows keep different numbers of weights.
    """
    op = "mask_select_threshold"
    _check_scores(op, scores)
    if not threshold < torch.inf:
        raise ValueError(f"{op}: threshold must be a number below infinity, got {threshold}")
    if ties < 0:
        raise ValueError(f"{op}: ties must not be negative, got {ties}")
    return backends.implementation(op, scores.device.type)(scores, threshold, ties)


@mask_select_threshold.register_fake
def _(scores: Tensor, threshold: float, ties: int = 0) -> Tensor:
    return scores.new_empty((scores.shape[0], (scores.shape[1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("persona::mask_select_global", mutates_args=())
def mask_select_global(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Keep the ``keep`` largest scores of all matrices together.

    Args:
        scores: matrices ``[N_i, K_i]``, float32, on one device. One matrix: a budget of its own.
            Minus infinity is allowed (ranked last); NaN and plus infinity raise ValueError.
        keep: how many weights stay in all, 0..sum of N_i * K_i. Equal scores go to the matrix that comes first,
            then to the lower row, then to the lower column.

    Returns:
        Packed masks uint8 ``[N_i, ceil(K_i / 8)]``, True = kept, in the order of ``scores``.
    """
    op = "mask_select_global"
    if not scores:
        raise ValueError(f"{op}: scores holds no matrix")
    for matrix in scores:
        _check_scores(op, matrix)
        checks.same_device(op, first=scores[0], another=matrix)
    checks.in_range(op, "keep", keep, 0, sum(matrix.numel() for matrix in scores))
    return backends.implementation(op, scores[0].device.type)(scores, keep)


@mask_select_global.register_fake
def _(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    return [s.new_empty((s.shape[0], (s.shape[1] + 7) // 8), dtype=torch.uint8) for s in scores]


def _check_scores(op: str, scores: Tensor) -> None:
    checks.dtype(op, "scores", scores, (torch.float32,))
    checks.shape(op, "scores", scores, (None, None), "[N, K]")


backends.register("mask_select_threshold", "reference", mask_select_threshold_reference)
backends.register("mask_select_global", "reference", mask_select_global_reference)
native.register("mask_select_threshold", mask_select_threshold_cpp)
native.register("mask_select_global", mask_select_global_cpp)
triton_backend.register(
    "mask_select_threshold", "kernels.ops.mask_select_global.triton", "mask_select_threshold_triton"
)
triton_backend.register("mask_select_global", "kernels.ops.mask_select_global.triton", "mask_select_global_triton")
