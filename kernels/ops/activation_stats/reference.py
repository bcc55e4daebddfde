"""Activation statistics in plain PyTorch: the oracle of every other backend."""

import torch
from torch import Tensor

FIELDS = ("rms", "ms", "square", "abs", "signed", "sink_square", "sink_abs", "sink_signed")


def activation_stats_reference(
    x: Tensor, role: Tensor, persona: Tensor, sums: Tensor, spans: Tensor | None = None
) -> Tensor:
    """See ``kernels.ops.activation_stats``. Sums within a sequence in float32 (float64 for float64 input)."""
    if spans is None:
        rows = _statistics(x, role)
    else:
        # One at a time: a sum of torch's depends on the shape around it, and a span must not.
        parts = [_statistics(x[b : b + 1, i:j], role[b : b + 1, i:j]) for b, i, j in spans.tolist()]
        rows = torch.cat(parts) if parts else sums.new_zeros(0, *sums.shape[1:])
    used, owner = persona.unique(return_inverse=True)
    # A matrix product instead of index_add_: no atomics, so the same bits in every run.
    membership = (owner.unsqueeze(1) == torch.arange(len(used), device=x.device)).to(torch.float64)
    sums[used] += torch.einsum("bp,bfk->pfk", membership, rows.to(torch.float64))
    return ~torch.isfinite(rows).flatten(1).all(1)


def _statistics(x: Tensor, role: Tensor) -> Tensor:
    """The fields of every row of ``x`` ``[B, T, K]``: ``[B, 8, K]``."""
    square, magnitude, signed = _moments(x, role == 1)
    counted = (role == 1).sum(1, keepdim=True)
    mean_square = square / counted.clamp(min=1)
    # Sinks sit in one column (the first, without left padding): read that column, not all of x.
    columns = (role == 2).any(0).nonzero().squeeze(1)
    sink = _moments(x[:, columns], role[:, columns] == 2)
    return torch.stack([mean_square.sqrt(), mean_square, square, magnitude, signed, *sink], dim=1)


def _moments(x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sequence sums of x^2, |x| and x over the counted tokens, each ``[B, K]``."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    # where, not a product: padding may hold NaN.
    kept = torch.where(counted.unsqueeze(-1), x, 0).to(work)
    return kept.square().sum(1), kept.abs().sum(1), kept.sum(1)
