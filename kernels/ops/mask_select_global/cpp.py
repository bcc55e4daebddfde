"""Selection by one threshold in C++ (``csrc/mask_select/threshold.h``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits
from kernels.ops.mask_select.reference import reject_unordered
from kernels.ops.mask_select_global.digits import BINS, select_by_digits


def mask_select_threshold_cpp(scores: Tensor, threshold: float, ties: int) -> Tensor:
    """See ``kernels.ops.mask_select_global.mask_select_threshold``."""
    bits = new_bits(scores)
    if torch.ops.persona_native.mask_select_threshold(scores, threshold, ties, bits):
        reject_unordered("scores", scores)
    return bits


def mask_select_global_cpp(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """See ``kernels.ops.mask_select_global.mask_select_global``."""
    return select_by_digits(scores, keep, _count, mask_select_threshold_cpp)


def _count(scores: Tensor, level: int, prefix: int) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    if torch.ops.persona_native.count_digits(scores, level, prefix, counts):
        reject_unordered("scores", scores)
    return counts
