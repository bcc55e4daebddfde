"""Selection by one threshold in C++ (``csrc/mask_select/threshold.h``)."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits
from kernels.ops.mask_select.reference import reject_unordered

DIGIT_BITS = (11, 11, 10)
"""How the 32-bit key of a score is counted, the most significant digit first; as in threshold.h."""


def mask_select_threshold_cpp(scores: Tensor, threshold: float, ties: int) -> Tensor:
    """See ``kernels.ops.mask_select_global.mask_select_threshold``."""
    bits = new_bits(scores)
    if torch.ops.persona_native.mask_select_threshold(scores, threshold, ties, bits):
        reject_unordered("scores", scores)
    return bits


def mask_select_global_cpp(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """See ``kernels.ops.mask_select_global.mask_select_global``: three passes of counting, one of writing."""
    key, room = 0, keep
    for level, bits in enumerate(DIGIT_BITS):
        counts = torch.stack([_count(matrix, level, key) for matrix in scores])
        if keep == 0:
            return [torch.zeros_like(new_bits(matrix)) for matrix in scores]
        # How many scores have a larger digit, for every digit; the threshold's is the first that leaves no room.
        total = counts.sum(0)
        larger = total.flip(0).cumsum(0).flip(0) - total
        digit = int((larger < room).nonzero()[0])
        room -= int(larger[digit])
        key = key << bits | digit
    masks, threshold = [], _score_of(key)
    for matrix, equal in zip(scores, counts[:, digit].tolist(), strict=True):
        masks.append(mask_select_threshold_cpp(matrix, threshold, min(room, equal)))
        room -= min(room, equal)
    return masks


def _count(scores: Tensor, level: int, prefix: int) -> Tensor:
    """How many scores whose key begins with ``prefix`` go on with each digit, int64 ``[2048]``."""
    counts = torch.zeros(2048, dtype=torch.int64)
    if torch.ops.persona_native.count_digits(scores, level, prefix, counts):
        reject_unordered("scores", scores)
    return counts


def _score_of(key: int) -> float:
    """The score whose key is ``key``: keys are unsigned integers in the order of the scores."""
    image = key - 2**31
    bits = image if image >= 0 else (image ^ 0x7FFFFFFF) & 0xFFFFFFFF
    return struct.unpack("<f", struct.pack("<I", bits))[0]
