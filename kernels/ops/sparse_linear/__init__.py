"""The product with a weight of which only the kept values are stored: one persona, shipped alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.eager import plain
from kernels.ops.pack_bits import pack_bits, unpack_bits
from kernels.ops.sparse_linear.cpp import sparse_linear_cpp
from kernels.ops.sparse_linear.cuda import sparse_linear_cuda
from kernels.ops.sparse_linear.reference import sparse_linear_reference

PADDING = 64
"""Zeros behind the last value: a vector load may begin at any value."""


@dataclass(frozen=True)
class SparseWeight:
    """The kept weights of ``[N, K]``, row by row, with a bit for every weight. Lossless both ways."""

    values: Tensor
    """``[kept + PADDING]``, the kept weights of row n at ``offsets[n]`` to ``offsets[n + 1]``, in order."""
    bits: Tensor
    """uint8 ``[N, ceil(K / 8)]``, True = kept."""
    offsets: Tensor
    """int64 ``[N + 1]``."""
    columns: int
    """K."""

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor) -> "SparseWeight":
        """Keep the values of ``weight`` ``[N, K]`` where the bool ``mask`` is True (zeros and NaN too)."""
        checks.shape("SparseWeight", "weight", weight, (None, None), "[N, K]")
        checks.dtype("SparseWeight", "weight", weight, checks.FLOATS)
        checks.dtype("SparseWeight", "mask", mask, (torch.bool,))
        checks.shape("SparseWeight", "mask", mask, tuple(weight.shape), "[N, K]")
        offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(mask.sum(1), 0, out=offsets[1:])
        values = torch.cat([weight[mask], weight.new_zeros(PADDING)])
        return cls(values, pack_bits(mask), offsets, weight.shape[1])

    def mask(self) -> Tensor:
        """bool ``[N, K]``, True = kept."""
        return unpack_bits(self.bits, self.columns)

    def to_dense(self) -> Tensor:
        """``[N, K]`` with 0 for every removed weight."""
        mask = self.mask()
        return self.values.new_zeros(mask.shape).masked_scatter_(mask, self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.bits.nbytes + self.offsets.nbytes


def sparse_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """``y = W x + b`` for ``x`` ``[M, K]`` and a weight without its removed values; ``[M, N]``, not differentiable."""
    return sparse_linear_packed(x, weight.values, weight.bits, weight.offsets, bias)


def sparse_linear_packed(
    x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``sparse_linear`` on the parts of a ``SparseWeight``; each row of ``bits`` must have as many set bits as its
    ``offsets`` are apart."""
    if plain(x, values, bias):
        return _compute(x, values, bits, offsets, bias)
    return _op(x, values, bits, offsets, bias)


def _compute(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    op = "sparse_linear"
    checks.dtype(op, "x", x, checks.FLOATS)
    checks.shape(op, "x", x, (None, None), "[M, K]")
    checks.dtype(op, "values", values, (x.dtype,))
    checks.shape(op, "values", values, (None,), "[kept + PADDING]")
    checks.dtype(op, "bits", bits, (torch.uint8,))
    checks.shape(op, "bits", bits, (None, (x.shape[1] + 7) // 8), "[N, ceil(K/8)]")
    checks.dtype(op, "offsets", offsets, (torch.int64,))
    checks.shape(op, "offsets", offsets, (bits.shape[0] + 1,), "[N + 1]")
    if bias is not None:
        checks.dtype(op, "bias", bias, (x.dtype,))
        checks.shape(op, "bias", bias, (bits.shape[0],), "[N]")
    checks.same_device(op, x=x, values=values, bits=bits, offsets=offsets, bias=bias)
    return backends.implementation(op, x.device.type)(x, values, bits, offsets, bias)


_op = torch.library.custom_op("persona::sparse_linear", _compute, mutates_args=())


@_op.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], bits.shape[0]))


backends.register("sparse_linear", "reference", sparse_linear_reference)
native.register("sparse_linear", sparse_linear_cpp, cuda=sparse_linear_cuda)
triton_backend.register("sparse_linear", "kernels.ops.sparse_linear.triton", "sparse_linear_triton")
