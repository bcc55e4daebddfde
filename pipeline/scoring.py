"""The paper's scores as pure functions of weights and statistics (Ye et al., arXiv 2602.07164).

Equation numbers are the paper's. Every function takes tensors and returns tensors, float64 statistics
in, float32 scores out; where paper and released code disagree, docs/method.md says what was chosen.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-8
FLOOR = 0.1
"""What is added to the variance of a gradient's entry, as a share of the mean. 0.01 to 1 differ by a few per cent
(docs/experiments.md)."""


def wanda(mean_abs: Tensor) -> Tensor:
    """Eq. 3: ``S_ij = |W_ij| A_j``; returns the channel score ``A`` ``[K]``."""
    return mean_abs.float()


def sparse(mean_square: Tensor, damping: float = 0.01) -> Tensor:
    """Eq. 5 with SparseGPT's diagonal approximation: ``S_ij = W_ij^2 / [H^-1]_jj``, ``H = diag(E x_j^2) + lambda I``.

    A diagonal H gives ``W_ij^2 (E x_j^2 + lambda)``, which ranks as ``|W_ij| sqrt(E x_j^2 + lambda)``:
    returns that channel score ``[K]``. ``lambda = damping * mean_j E x_j^2``.
    """
    return (mean_square + damping * mean_square.mean()).sqrt().float()


def contrast(mu_own: Tensor, mu_other: Tensor, variance_own: Tensor, variance_other: Tensor) -> Tensor:
    """Eq. 8's argument ``z_j = (mu+ - mu-) / (sqrt(var+ + var-) + eps)`` ``[K]``, float64.

    ``eps`` is relative to the channel's own scale, so that a channel which never varies gives a large
    but finite value; a channel that is always 0 gives 0.
    """
    scale = mu_own.abs() + mu_other.abs()
    return (mu_own - mu_other) / (
        (variance_own + variance_other).sqrt() + EPSILON * scale + torch.finfo(torch.float64).tiny
    )


def contrastive_wanda(z: Tensor, activation: str, temperature: float) -> Tensor:
    """Eq. 8: ``S_ij = |W_ij| phi(z_j)``; returns the channel score ``phi(z)`` ``[K]``.

    ``activation`` is "relu" or "softplus" (``softplus(z / temperature)``).
    """
    score = F.relu(z) if activation == "relu" else F.softplus(z / temperature)
    return score.float().clamp(max=1e30)


def contrastive_sparse(weight: Tensor, score_own: Tensor, score_other: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 9: the weights a persona owns, and how each weight ranks among the owned or the rest.

    Args:
        weight: ``[N, K]``.
        score_own, score_other: the two personas' ``sparse`` channel scores ``[K]``.

    Returns:
        ``owned`` and ``rank``, float32 ``[N, K]``. ``S~ = S / sum_k S_ik`` per row (0 where the row's
        scores sum to 0) with ``S = W^2 a^2``; a weight is owned where ``S~_own >= S~_other``. Owned
        weights rank by ``C = S~_own - S~_other``, the others by ``S~_own``.
    """
    square = weight.double().square()
    own, other = (_normalised(square * score.double().square()) for score in (score_own, score_other))
    owned = own >= other
    return owned.float(), torch.where(owned, own - other, own).float()


def _normalised(score: Tensor) -> Tensor:
    total = score.sum(1, keepdim=True)
    return torch.where(total > 0, score / total, 0.0)


def first_order_gain(weight: Tensor, gradient: Tensor) -> Tensor:
    """What removing each weight adds to the margin, to first order: ``-W_ij g_ij`` ``[N, K]`` float32.

    ``gradient`` is that of the persona's margin (docs/method.md, signed criteria). Ours, not the paper's.
    """
    return -(weight.float() * gradient.float())


def disturbance(weight: Tensor, rms: Tensor) -> Tensor:
    """Mean square of what a removed weight takes from its output, ``(W_ij rms_j)^2`` ``[N, K]`` float32.

    Blind to what the output does further on: comparable within a row only.
    """
    return (weight.float() * rms.float()).square()


def floored(variance: Tensor) -> Tensor:
    """Variances measured on few answers, none of them near 0: plus ``FLOOR`` of their mean."""
    return variance + FLOOR * variance.mean()


def likelihood_damage(weight: Tensor, variance: Tensor) -> Tensor:
    """Second-order cost of a removed weight to the model's text, ``W_ij^2 F_ij``, up to one factor for all layers.

    ``F`` is the diagonal of the Fisher information, which is the ``variance`` ``[N, K]`` of the likelihood's gradient
    over texts. Measured on few batches a single ``F_ij`` comes out far too small by chance, hence ``floored``. Returns
    float32 ``[N, K]``.
    """
    return weight.float().square() * floored(variance.float())


def gain_per_damage(gain: Tensor, damage: Tensor) -> Tensor:
    """Both ``[N, K]``; 0 where there is no damage: such a weight is 0 or its input is, so it gains nothing either."""
    return torch.where(damage > 0, gain / damage, 0.0).clamp(max=3e38)
