"""The masked product: many personas on one shared weight, chosen row by row."""

from typing import Any

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.eager import plain
from kernels.ops.masked_linear.cpp import masked_linear_cpp
from kernels.ops.masked_linear.cuda import masked_linear_cuda
from kernels.ops.masked_linear.reference import masked_linear_backward_reference, masked_linear_reference


def masked_linear(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """``y_m = (W * G_p(m)) x_m + b`` with the gate ``G = M + gamma (1 - M)`` (paper eq. 6 and 7).

    Args:
        x: ``[M, K]``.
        weight: ``[N, K]``, dtype of ``x``.
        bits: packed masks uint8 ``[P, N, ceil(K / 8)]``, True = kept.
        persona: int32 ``[M]``, or ``[1]`` for all rows: index into ``bits``, -1 for the plain weight.
            One that does not exist raises ValueError; a GPU backend must not wait for the values and
            fills such a row with NaN.
        gamma: share of a removed weight that stays, 0 <= gamma < 1. At 0 a removed weight is 0, whatever it was,
            NaN and infinity too; with an infinite x that 0 gives NaN, as in any product.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]``. Differentiable in ``x``, ``weight`` and ``bias``.
    """
    if plain(x, weight, bias):
        return _compute(x, weight, bits, persona, gamma, bias)
    return _op(x, weight, bits, persona, gamma, bias)


def _compute(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    op = "masked_linear"
    checks.dtype(op, "x", x, checks.FLOATS)
    checks.shape(op, "x", x, (None, None), "[M, K]")
    checks.dtype(op, "weight", weight, (x.dtype,))
    checks.shape(op, "weight", weight, (None, x.shape[1]), "[N, K]")
    rows, columns = weight.shape
    checks.dtype(op, "bits", bits, (torch.uint8,))
    checks.shape(op, "bits", bits, (None, rows, (columns + 7) // 8), "[P, N, ceil(K/8)]")
    checks.dtype(op, "persona", persona, (torch.int32,))
    if persona.shape != (1,):
        checks.shape(op, "persona", persona, (x.shape[0],), "[M]")
    if bias is not None:
        checks.dtype(op, "bias", bias, (x.dtype,))
        checks.shape(op, "bias", bias, (rows,), "[N]")
    checks.same_device(op, x=x, weight=weight, bits=bits, persona=persona, bias=bias)
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"{op}: gamma must satisfy 0 <= gamma < 1, got {gamma}")
    return backends.implementation(op, x.device.type)(x, weight, bits, persona, gamma, bias)


_op = torch.library.custom_op("persona::masked_linear", _compute, mutates_args=())


@_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bits, persona, gamma, bias = inputs
    ctx.save_for_backward(x, weight, bits, persona)
    ctx.gamma, ctx.has_bias = gamma, bias is not None


def _backward(ctx, grad: Tensor):
    x, weight, bits, persona = ctx.saved_tensors
    grad_x, grad_weight = masked_linear_backward(grad, x, weight, bits, persona, ctx.gamma)
    return grad_x, grad_weight, None, None, None, grad.sum(0) if ctx.has_bias else None


@torch.library.custom_op("persona::masked_linear_backward", mutates_args=())
def masked_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``masked_linear`` with respect to ``x`` ``[M, K]`` and ``weight`` ``[N, K]``."""
    return masked_linear_backward_reference(grad, x, weight, bits, persona, gamma)


@masked_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


_op.register_autograd(_backward, setup_context=_setup_context)
backends.register("masked_linear", "reference", masked_linear_reference)
native.register("masked_linear", masked_linear_cpp, cuda=masked_linear_cuda)
triton_backend.register("masked_linear", "kernels.ops.masked_linear.triton", "masked_linear_triton")
