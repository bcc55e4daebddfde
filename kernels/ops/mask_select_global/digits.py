"""The best scores of several matrices by counting the digits of their keys, whatever counts and writes them."""

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits

DIGIT_BITS = (11, 11, 10)
"""How the 32-bit key of a score is counted, the most significant digit first; as in threshold.h."""
BINS = 1 << max(DIGIT_BITS)
"""Room for the counts of a digit."""


def select_by_digits(
    scores: Sequence[Tensor],
    keep: int,
    count: Callable[[Tensor, int, int], Tensor],
    select: Callable[[Tensor, float, int], Tensor],
) -> list[Tensor]:
    """``mask_select_global``: three passes of counting, one of writing.

    ``count(scores, level, prefix)``: how many scores whose key begins with ``prefix`` go on with each digit, int64
    ``[BINS]``; it rejects what has no order. ``select`` is ``mask_select_threshold``.
    """
    key, room = 0, keep
    for level, bits in enumerate(DIGIT_BITS):
        counts = torch.stack([count(matrix, level, key) for matrix in scores])
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
        masks.append(select(matrix, threshold, min(room, equal)))
        room -= min(room, equal)
    return masks


def _score_of(key: int) -> float:
    """The score whose key is ``key``: keys are unsigned integers in the order of the scores."""
    image = key - 2**31
    bits = image if image >= 0 else (image ^ 0x7FFFFFFF) & 0xFFFFFFFF
    return struct.unpack("<f", struct.pack("<I", bits))[0]
