"""Packed masks: 8 weights a byte, little bit order (weight column 8 j + i is bit i of byte j)."""

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.pack_bits.cpp import pack_bits_cpp, unpack_bits_cpp
from kernels.ops.pack_bits.reference import pack_bits_reference, unpack_bits_reference


@torch.library.custom_op("persona::pack_bits", mutates_args=())
def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask ``[..., K]`` (True = kept) into uint8 ``[..., ceil(K / 8)]``.

    The unused high bits of the last byte are 0. Raises TypeError unless ``mask`` is bool.
    """
    checks.dtype("pack_bits", "mask", mask, (torch.bool,))
    if mask.dim() == 0:
        raise ValueError(f"pack_bits: mask needs at least one dimension, got {checks.describe(mask)}")
    return backends.implementation("pack_bits", mask.device.type)(mask)


@pack_bits.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((*mask.shape[:-1], (mask.shape[-1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("persona::unpack_bits", mutates_args=())
def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Unpack uint8 ``[..., ceil(K / 8)]`` into a boolean mask ``[..., K]``; ``columns`` is K."""
    checks.dtype("unpack_bits", "bits", bits, (torch.uint8,))
    if bits.dim() == 0 or bits.shape[-1] != (columns + 7) // 8:
        raise ValueError(
            f"unpack_bits: bits [..., ceil(K / 8)] for K = {columns} needs {(columns + 7) // 8} bytes a row, "
            f"got {checks.describe(bits)}"
        )
    return backends.implementation("unpack_bits", bits.device.type)(bits, columns)


@unpack_bits.register_fake
def _(bits: Tensor, columns: int) -> Tensor:
    return bits.new_empty((*bits.shape[:-1], columns), dtype=torch.bool)


backends.register("pack_bits", "reference", pack_bits_reference)
backends.register("unpack_bits", "reference", unpack_bits_reference)
native.register("pack_bits", pack_bits_cpp)
native.register("unpack_bits", unpack_bits_cpp)
triton_backend.register("pack_bits", "kernels.ops.pack_bits.triton", "pack_bits_triton")
triton_backend.register("unpack_bits", "kernels.ops.pack_bits.triton", "unpack_bits_triton")
