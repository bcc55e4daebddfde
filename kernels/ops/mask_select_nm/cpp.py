"""N:M mask selection in C++ (``csrc/mask_select/nm.h``)."""

import torch
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits
from kernels.ops.mask_select.reference import reject_unordered


def mask_select_nm_cpp(weight: Tensor, channel_score: Tensor, n: int, m: int) -> Tensor:
    """See ``kernels.ops.mask_select_nm``."""
    bits = new_bits(weight)
    if torch.ops.persona_native.mask_select_nm(weight, channel_score.contiguous(), n, m, bits):
        reject_unordered("scores", weight.float().abs() * channel_score)
    return bits
