"""The dense product less the products of the removed weights: for masks that remove little."""

from typing import Any

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.correction_linear.cpp import correction_linear_cpp
from kernels.ops.correction_linear.reference import correction_linear_reference
from kernels.ops.eager import plain
from kernels.ops.pack_bits import unpack_bits

MOST_COLUMNS = 1 << 16
"""A removed weight is listed by its column in 16 bits."""


def removed_lists(bits: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The removed columns of every row of packed masks uint8 ``[P, N, ceil(K / 8)]`` (True = kept); ``columns`` is K.

    Returns uint16 ``[removed]`` and int32 ``[P, N + 1]``: persona p removes from row n the columns
    ``list[offsets[p, n]:offsets[p, n + 1]]``, in order.
    """
    op = "removed_lists"
    checks.dtype(op, "bits", bits, (torch.uint8,))
    checks.shape(op, "bits", bits, (None, None, (columns + 7) // 8), "[P, N, ceil(K/8)]")
    checks.in_range(op, "columns", columns, 0, MOST_COLUMNS)
    lists = []
    offsets = torch.zeros(bits.shape[0], bits.shape[1] + 1, dtype=torch.int64, device=bits.device)
    start = 0
    for index, packed in enumerate(bits):
        removed = ~unpack_bits(packed, columns)
        offsets[index, 1:] = removed.sum(1).cumsum(0)
        offsets[index] += start
        lists.append(removed.nonzero()[:, 1].to(torch.uint16))
        start += lists[-1].numel()
    checks.in_range(op, "number of removed weights", start, 0, 2**31 - 1)
    none = torch.empty(0, dtype=torch.uint16, device=bits.device)
    return torch.cat([none, *lists]), offsets.to(torch.int32)


def correction_linear(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    offsets: Tensor,
    persona: Tensor,
    gamma: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``y_m = W x_m - (1 - gamma) (W * R_p(m)) x_m + b`` where R marks the weights that persona p removes.

    The same product as ``masked_linear`` up to rounding, as long as the removed weights are finite: here they are
    added and taken away again. Not differentiable.

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``, dtype of ``x``.
        columns: uint16, and
        offsets: int32 ``[P, N + 1]``: from ``removed_lists``.
        persona: int32 ``[M]``, or ``[1]`` for all rows: index into ``offsets``, -1 for the plain weight.
            One that does not exist raises ValueError.
        gamma: share of a removed weight that stays, 0 <= gamma < 1.
        bias: ``[N]`` or None.
    """
    if plain(x, weight, bias):
        return _compute(x, weight, columns, offsets, persona, gamma, bias)
    return _op(x, weight, columns, offsets, persona, gamma, bias)


def _compute(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    offsets: Tensor,
    persona: Tensor,
    gamma: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    op = "correction_linear"
    checks.dtype(op, "x", x, checks.FLOATS)
    checks.shape(op, "x", x, (None, None), "[M, K]")
    checks.dtype(op, "weight", weight, (x.dtype,))
    checks.shape(op, "weight", weight, (None, x.shape[1]), "[N, K]")
    checks.dtype(op, "columns", columns, (torch.uint16,))
    checks.shape(op, "columns", columns, (None,), "[removed]")
    checks.dtype(op, "offsets", offsets, (torch.int32,))
    checks.shape(op, "offsets", offsets, (None, weight.shape[0] + 1), "[P, N + 1]")
    checks.dtype(op, "persona", persona, (torch.int32,))
    if persona.shape != (1,):
        checks.shape(op, "persona", persona, (x.shape[0],), "[M]")
    if bias is not None:
        checks.dtype(op, "bias", bias, (x.dtype,))
        checks.shape(op, "bias", bias, (weight.shape[0],), "[N]")
    checks.same_device(op, x=x, weight=weight, columns=columns, offsets=offsets, persona=persona, bias=bias)
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"{op}: gamma must satisfy 0 <= gamma < 1, got {gamma}")
    return backends.implementation(op, x.device.type)(x, weight, columns, offsets, persona, gamma, bias)


_op = torch.library.custom_op("persona::correction_linear", _compute, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


backends.register("correction_linear", "reference", correction_linear_reference)
native.register("correction_linear", correction_linear_cpp)
triton_backend.register("correction_linear", "kernels.ops.correction_linear.triton", "correction_linear_triton")
