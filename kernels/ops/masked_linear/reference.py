"""The masked product in plain PyTorch: one dense product for each persona in the batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.ops.pack_bits.reference import unpack_bits_reference


def gated_weight(weight: Tensor, bits: Tensor, gamma: float) -> Tensor:
    """``W * (M + gamma (1 - M))`` ``[N, K]`` from one packed mask ``[N, ceil(K / 8)]``."""
    # A product with a gamma of 0 would let infinity and NaN through.
    removed = weight * gamma if gamma else weight.new_zeros(())
    return torch.where(unpack_bits_reference(bits, weight.shape[1]), weight, removed)


def masked_linear_reference(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.masked_linear``."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    for index, rows in rows_of_each(persona, x.shape[0], bits.shape[0]):
        gated = weight if index < 0 else gated_weight(weight, bits[index], gamma)
        y[rows] = F.linear(x[rows], gated, bias)
    return y


def masked_linear_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """``dx_m = G W^T dy_m``, ``dW = sum_p G_p * (dy^T x over the rows of p)``."""
    grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(weight)
    for index, rows in rows_of_each(persona, x.shape[0], bits.shape[0]):
        product = grad[rows].T @ x[rows]
        if index < 0:
            grad_x[rows] = grad[rows] @ weight
            grad_weight += product
        else:
            grad_x[rows] = grad[rows] @ gated_weight(weight, bits[index], gamma)
            grad_weight += gated_weight(product, bits[index], gamma)
    return grad_x, grad_weight


def rows_of_each(
    persona: Tensor, count: int, personas: int, op: str = "masked_linear"
) -> Iterator[tuple[int, slice | Tensor]]:
    """Every persona index present, with the rows it owns."""
    present = check_personas(persona, personas, op)
    if len(present) == 1:
        yield present[0], slice(0, count)
        return
    for index in present:
        yield index, (persona == index).nonzero().squeeze(1)


def check_personas(persona: Tensor, personas: int, op: str = "masked_linear") -> list[int]:
    """The persona indices present, in order; ValueError if one of them has no mask."""
    present = persona.tolist() if persona.shape[0] == 1 else persona.unique().tolist()
    if present and not -1 <= present[0] <= present[-1] < personas:
        raise ValueError(f"{op}: persona must lie in -1..{personas - 1}, got {present}")
    return present
