"""The correction form in plain PyTorch: two dense products, the second with a weight that is mostly zeros."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.ops.masked_linear.reference import rows_of_each


def removed_weight(weight: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """``[N, K]``: the weights that a persona with ``offsets`` ``[N + 1]`` removes, 0 for those that it keeps."""
    start, end = int(offsets[0]), int(offsets[-1])
    rows = torch.arange(weight.shape[0], device=weight.device).repeat_interleave(offsets.diff())
    places = (rows, columns[start:end].to(torch.int64))
    removed = torch.zeros_like(weight)
    removed[places] = weight[places]
    return removed


def correction_linear_reference(
    x: Tensor, weight: Tensor, columns: Tensor, offsets: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.correction_linear``. Half precision is added up in float32: the difference is rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_x, wide_weight = x.to(wide), weight.to(wide)
    y = F.linear(wide_x, wide_weight, None if bias is None else bias.to(wide))
    for index, rows in rows_of_each(persona, x.shape[0], offsets.shape[0], "correction_linear"):
        if index >= 0:
            y[rows] -= (1 - gamma) * F.linear(wide_x[rows], removed_weight(wide_weight, columns, offsets[index]))
    return y.to(x.dtype)
