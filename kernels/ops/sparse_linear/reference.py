"""The sparse product in plain PyTorch: the weight with its zeros, then a dense product."""

from torch import Tensor
from torch.nn import functional as F

from kernels.ops.pack_bits.reference import unpack_bits_reference


def sparse_linear_reference(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See ``kernels.ops.sparse_linear``."""
    mask = unpack_bits_reference(bits, x.shape[1])
    return F.linear(x, values.new_zeros(mask.shape).masked_scatter_(mask, values), bias)
