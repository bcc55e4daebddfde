"""Row-wise mask selection in C++, and in CUDA for tensors there (``csrc/mask_select``)."""

import torch
from torch import Tensor

from kernels.ops.mask_select.reference import reject_unordered


def new_bits(values: Tensor) -> Tensor:
    """Room for the packed mask of ``values`` ``[N, K]``: uint8 ``[N, ceil(K / 8)]``."""
    return torch.empty(values.shape[0], (values.shape[1] + 7) // 8, dtype=torch.uint8, device=values.device)


def mask_select_cpp(weight: Tensor, channel_score: Tensor, keep: int) -> Tensor:
    """See ``kernels.ops.mask_select.mask_select``."""
    bits = new_bits(weight)
    if torch.ops.persona_native.mask_select(weight, channel_score.contiguous(), None, keep, bits):
        reject_unordered("scores", weight.float().abs() * channel_score)
    return bits


def mask_select_scores_cpp(scores: Tensor, keep: int, tiebreak: Tensor | None) -> Tensor:
    """See ``kernels.ops.mask_select.mask_select_scores``."""
    bits = new_bits(scores)
    if torch.ops.persona_native.mask_select(scores, None, tiebreak, keep, bits):
        # The rows were looked at in order: a bad tiebreak may lie in front of a bad score.
        reject_unordered("scores", scores)
        if tiebreak is not None:
            reject_unordered("tiebreak", tiebreak)
    return bits
