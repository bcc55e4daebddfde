"""Selection by one threshold in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops.mask_select.reference import above_threshold, reject_unordered
from kernels.ops.pack_bits.reference import pack_bits_reference


def mask_select_threshold_reference(scores: Tensor, threshold: float, ties: int) -> Tensor:
    """Packed mask of what exceeds ``threshold``, and of its first ``ties`` equals in row-major order."""
    reject_unordered("scores", scores)
    border = torch.tensor(threshold, dtype=scores.dtype, device=scores.device)
    equal = (scores == border).flatten()
    kept = (scores > border) | (equal & (equal.cumsum(0) <= ties)).view(scores.shape)
    return pack_bits_reference(kept)


def mask_select_global_reference(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """All matrices as one row of scores."""
    for matrix in scores:
        reject_unordered("scores", matrix)
    kept = above_threshold(torch.cat([matrix.flatten() for matrix in scores]).unsqueeze(0), keep).squeeze(0)
    parts = kept.split([matrix.numel() for matrix in scores])
    return [pack_bits_reference(part.view(matrix.shape)) for part, matrix in zip(parts, scores, strict=True)]
