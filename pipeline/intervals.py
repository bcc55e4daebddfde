"""Uncertainty of evaluation numbers."""

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; items are resampled, so paired differences stay paired."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive exceeds a negative, ties counted half; NaN if one side is empty."""
    a, b = np.asarray(positive)[:, None], np.asarray(negative)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean()) if a.size and b.size else float("nan")
