"""Row-wise mask selection in plain PyTorch: the oracle of every other backend."""

import torch
from torch import Tensor

from kernels.ops.pack_bits.reference import pack_bits_reference


def mask_select_reference(weight: Tensor, channel_score: Tensor, keep: int) -> Tensor:
    """Packed mask of the ``keep`` largest ``|W_ij| * a_j`` of every row."""
    return mask_select_scores_reference(weight.float().abs() * channel_score, keep, None)


def mask_select_scores_reference(scores: Tensor, keep: int, tiebreak: Tensor | None) -> Tensor:
    """Packed mask of the ``keep`` largest scores of every row; ties by ``tiebreak``, then lower column."""
    reject_unordered("scores", scores)
    if tiebreak is None:
        return pack_bits_reference(above_threshold(scores, keep))
    reject_unordered("tiebreak", tiebreak)
    # Two stable sorts rank by (score, tiebreak, column): the second keeps the first's order among equals.
    by_tiebreak = torch.sort(tiebreak, dim=1, descending=True, stable=True).indices
    by_score = torch.sort(scores.gather(1, by_tiebreak), dim=1, descending=True, stable=True).indices
    kept = by_tiebreak.gather(1, by_score)[:, :keep]
    return pack_bits_reference(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True))


def above_threshold(scores: Tensor, keep: int) -> Tensor:
    """Everything above the row's ``keep``-th largest score, and of its equals the leftmost that still fit."""
    rows, columns = scores.shape
    if keep == 0 or rows == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, columns - keep + 1, dim=1, keepdim=True).values
    above, equal = scores > threshold, scores == threshold
    room = keep - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def reject_unordered(name: str, values: Tensor) -> None:
    """Raises ValueError if ``values`` ``[N, K]`` holds NaN or plus infinity, and names the first."""
    bad = torch.isnan(values) | (values == torch.inf)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"mask selection: {name}[{row}, {column}] is {values[row, column].item()} "
            f"({int(bad.sum())} of {values.numel()} are NaN or infinite)"
        )
