"""Bit packing in C++ (``csrc/pack_bits``)."""

import math

import torch
from torch import Tensor


def pack_bits_cpp(mask: Tensor) -> Tensor:
    """See ``kernels.ops.pack_bits.pack_bits``."""
    *rows, columns = mask.shape
    bits = torch.empty(*rows, (columns + 7) // 8, dtype=torch.uint8)
    flat = mask.reshape(math.prod(rows), columns).contiguous()
    torch.ops.persona_native.pack_bits(flat, bits.view(math.prod(rows), bits.shape[-1]))
    return bits


def unpack_bits_cpp(bits: Tensor, columns: int) -> Tensor:
    """See ``kernels.ops.pack_bits.unpack_bits``."""
    *rows, width = bits.shape
    mask = torch.empty(*rows, columns, dtype=torch.bool)
    flat = bits.reshape(math.prod(rows), width).contiguous()
    torch.ops.persona_native.unpack_bits(flat, columns, mask.view(math.prod(rows), columns))
    return mask
