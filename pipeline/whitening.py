"""How much each calibration answer should count in a margin's gradient, so that the rest of the text hardly moves.

Plain averaging (the difference of the two poles' mean gradients) is the nearest-centroid classifier in the space of
gradients: whatever else distinguishes these answers, and whatever any text shares, moves along. The linear
discriminant divides by the covariance there. Gradients of log-probabilities are scores, and their covariance is the
Fisher information: to second order the divergence between the model before and after. So the same weights find the
most margin for the least change of the model, among all combinations of the gradients at hand.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.scoring import floored

RIDGE = 0.03
"""What is added to the covariance, as a share of an answer's mean squared gradient. 0.01 to 0.1 differ by a few
per cent (docs/experiments.md)."""


def standardised(*groups: Tensor, beside: Sequence[Tensor] = ()) -> Tensor:
    """Gradients in units in which each entry varies alike: the diagonal of the Fisher information is then the identity.

    Args:
        groups: ``[n, C]`` each, entries of the gradients of texts of one kind (a pole's answers, neutral texts).
        beside: ``[C]`` each, more gradients in the same units, which do not define them.

    Returns:
        All of them in turn, every column over the standard deviation around its own group's mean.
    """
    scatter = torch.stack([(group - group.mean(0)).square().sum(0) for group in groups if len(group)]).sum(0)
    count = sum(map(len, groups))
    every = torch.cat((*groups, *(one[None] for one in beside)))
    return torch.where(scatter.any(), every * floored(scatter / count).rsqrt(), every)


def contrast_weights(gram: Tensor, items: int, loops: int = 0, *, against: float = 0.0, ridge: float = RIDGE) -> Tensor:
    """Weights ``c`` of the gradients in the regularised linear discriminant between two poles.

    Args:
        gram: Inner products ``[M, M]`` of the gradients of mean log-probabilities: of the answers of one pole to
            ``items`` questions, of the other pole's answers to the same, of what the model repeats (``loops``), then of
            neutral texts and whatever else is to stay as it is.
        items: Number n of questions, at least 1.
        loops: Number l of repetitions; ``M >= 2 n + l``.
        against: How much the mean repetition weighs in the contrast, L; of no effect without any.
        ridge: Share of the mean squared length of an answer's gradient that is added to the diagonal.

    Returns:
        Float64 ``[M]``. ``sum_i c_i g_i = (1 + S / r)^-1 ((1 + L) mean g_own - mean g_other - L mean g_loops)``, where
        ``S`` is the scatter of each group around its own mean plus that of neutral texts around zero, and ``r`` the
        ridge times the mean squared length. The weights of a group add up to 1 + L, -1 and -L. Without any gradient
        they are alike within it. Raises ValueError for what is no Gram matrix of so many.
    """
    size = len(gram)
    if gram.shape != (size, size) or not 1 <= items <= (size - loops) // 2 or loops < 0:
        raise ValueError(
            f"gram {list(gram.shape)} is no Gram matrix of 2 x {items} answers, {loops} repetitions and neutral texts"
        )
    gram = gram.double()
    plain, scatter = _contrast(size, items, loops, against), torch.eye(size, dtype=torch.float64)
    for _, group in _groups(items, loops, against):
        scatter[group, group] -= 1 / max(group.stop - group.start, 1)
    length = float(gram.diagonal()[: 2 * items].mean())
    if length == 0:
        return plain
    # Woodbury: the inverse acts within the span of the gradients.
    inner = scatter @ gram @ scatter.T + ridge * length * torch.eye(size, dtype=torch.float64)
    return plain - scatter.T @ torch.linalg.solve(inner, scatter @ gram @ plain)


def weights_beside(
    gram: Tensor, beside: int, items: int, loops: int = 0, *, against: float = 0.0
) -> tuple[Tensor, float]:
    """``contrast_weights`` where the last ``beside`` gradients are other pairs' margins, to be left alone.

    Returns the weights, and how much of the contrast they keep at the same change of the model, in [0, 1]: the root of
    what the contrast changes along this direction over what it changes without the others.
    """
    weights = contrast_weights(gram, items, loops, against=against)
    alone = len(gram) - beside
    if not beside:
        return weights, 1.0
    before = contrast_weights(gram[:alone, :alone], items, loops, against=against)
    slope = gram.double() @ _contrast(len(gram), items, loops, against)
    first, now = float(slope[:alone] @ before), float(slope @ weights)
    return weights, math.sqrt(max(now, 0.0) / first) if first > 0 else 1.0


def _contrast(size: int, items: int, loops: int, against: float) -> Tensor:
    """The contrast as weights of ``size`` gradients, float64."""
    found = torch.zeros(size, dtype=torch.float64)
    for total, group in _groups(items, loops, against):
        found[group] = total / max(group.stop - group.start, 1)
    return found


def _groups(items: int, loops: int, against: float) -> list[tuple[float, slice]]:
    """What the weights of a group add up to, and where it is."""
    against = against if loops else 0.0
    ends = items, 2 * items, 2 * items + loops
    return list(zip((1 + against, -1.0, -against), map(slice, (0, *ends), ends), strict=False))
