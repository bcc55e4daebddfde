"""How much each calibration answer should count in a margin's gradient, so that the rest of the text hardly moves.

Plain averaging (the difference of the two poles' mean gradients) is the nearest-centroid classifier in the space of
gradients: whatever else distinguishes these answers, and whatever any text shares, moves along. The linear
discriminant divides by the covariance there. Gradients of log-probabilities are scores, and their covariance is the
Fisher information: to second order the divergence between the model before and after. So the same weights find the
most margin for the least change of the model, among all combinations of the gradients at hand.
"""

import torch
from torch import Tensor

from pipeline.scoring import floored

RIDGE = 0.03
"""What is added to the covariance, as a share of an answer's mean squared gradient. 0.01 to 0.1 differ by a few
per cent (docs/experiments.md)."""


def standardised(answers: Tensor, neutral: Tensor) -> Tensor:
    """Gradients in units in which each entry varies alike: the diagonal of the Fisher information is then the identity.

    Args:
        answers: ``[2 n, C]`` entries of the gradients of one pole's answers, then of the other's.
        neutral: ``[m, C]`` of neutral texts.

    Returns:
        Both, ``[2 n + m, C]``, every column over the standard deviation around its own group's mean.
    """
    items = len(answers) // 2
    groups = [group for group in (answers[:items], answers[items:], neutral) if len(group)]
    scatter = torch.stack([(group - group.mean(0)).square().sum(0) for group in groups]).sum(0)
    every = torch.cat([answers, neutral])
    return torch.where(scatter.any(), every * floored(scatter / len(every)).rsqrt(), every)


def contrast_weights(gram: Tensor, items: int, ridge: float = RIDGE) -> Tensor:
    """Weights ``c`` of the gradients in the regularised linear discriminant between two poles.

    Args:
        gram: Inner products ``[M, M]`` of the gradients of mean log-probabilities: of the answers of one pole to
            ``items`` questions, of the other pole's answers to the same, then of neutral texts.
        items: Number n of questions, at least 1; ``M >= 2 n``.
        ridge: Share of the mean squared length of an answer's gradient that is added to the diagonal.

    Returns:
        Float64 ``[M]``. ``sum_i c_i g_i = (1 + S / r)^-1 (mean g_plus - mean g_minus)``, where ``S`` is the scatter
        of the answers around their own pole's mean plus that of neutral texts around zero, and ``r`` the ridge times
        the mean squared length. The n weights of a pole add up to 1 and -1. Without any gradient they are 1/n and
        -1/n. Raises ValueError for what is no Gram matrix of so many items.
    """
    size = len(gram)
    if gram.shape != (size, size) or not 1 <= items <= size // 2:
        raise ValueError(f"gram {list(gram.shape)} is no Gram matrix of 2 x {items} answers and neutral texts")
    gram = gram.double()
    contrast = torch.zeros(size, dtype=torch.float64)
    contrast[:items], contrast[items : 2 * items] = 1 / items, -1 / items
    length = float(gram.diagonal()[: 2 * items].mean())
    if length == 0:
        return contrast
    scatter = torch.eye(size, dtype=torch.float64)
    for pole in (slice(0, items), slice(items, 2 * items)):
        scatter[pole, pole] -= 1 / items
    # Woodbury: the inverse acts within the span of the gradients.
    inner = scatter @ gram @ scatter.T + ridge * length * torch.eye(size, dtype=torch.float64)
    return contrast - scatter.T @ torch.linalg.solve(inner, scatter @ gram @ contrast)
