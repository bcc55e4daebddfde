"""Bit packing in Triton: a program packs or unpacks a block of a row."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns of a program; for narrower rows the next power of two."""


@triton.jit
def store_packed(bits_ptr, start, K, kept, BLOCK: tl.constexpr):
    """Eight columns a byte, the lowest column in the lowest bit; ``kept`` bool ``[BLOCK]`` begins at ``start``."""
    groups = kept.to(tl.int32).reshape(BLOCK // 8, 8)
    packed = tl.sum(groups << tl.arange(0, 8)[None, :], 1)
    offsets = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bits_ptr + offsets, packed.to(tl.uint8), offsets < tl.cdiv(K, 8))


@triton.jit
def _pack_kernel(mask_ptr, bits_ptr, K, BLOCK: tl.constexpr):
    """``mask_ptr`` uint8 ``[R, K]``, 0 or 1, to ``bits_ptr`` ``[R, ceil(K / 8)]``, both contiguous."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    kept = tl.load(mask_ptr + row * K + columns, columns < K, 0)
    store_packed(bits_ptr + row * tl.cdiv(K, 8), start, K, kept != 0, BLOCK)


@triton.jit
def _unpack_kernel(bits_ptr, mask_ptr, K, BLOCK: tl.constexpr):
    """``_pack_kernel`` the other way."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    offsets = start // 8 + tl.arange(0, BLOCK // 8)
    packed = tl.load(bits_ptr + row * tl.cdiv(K, 8) + offsets, offsets < tl.cdiv(K, 8), 0)
    kept = (packed[:, None] >> tl.arange(0, 8)[None, :].to(tl.uint8)) & 1
    columns = start + tl.arange(0, BLOCK)
    tl.store(mask_ptr + row * K + columns, kept.reshape(BLOCK), columns < K)


def block_of(columns: int) -> int:
    """Columns of a program for rows of ``columns``."""
    return min(max(triton.next_power_of_2(columns), 32), BLOCK)


def over_blocks(kernel: Any, rows: int, columns: int, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel`` with a program for every ``block_of(columns)`` columns of every row, on the device of its first
    argument."""
    block = block_of(columns)
    with torch.cuda.device_of(arguments[0]):
        kernel[(rows, triton.cdiv(columns, block))](*arguments, **constants, BLOCK=block, num_warps=4)


def pack_bits_triton(mask: Tensor) -> Tensor:
    """See ``kernels.ops.pack_bits.pack_bits``."""
    *rows, columns = mask.shape
    bits = torch.empty(*rows, (columns + 7) // 8, dtype=torch.uint8, device=mask.device)
    if bits.numel():
        over_blocks(_pack_kernel, math.prod(rows), columns, mask.contiguous().view(torch.uint8), bits, columns)
    return bits


def unpack_bits_triton(bits: Tensor, columns: int) -> Tensor:
    """See ``kernels.ops.pack_bits.unpack_bits``."""
    *rows, _ = bits.shape
    mask = torch.empty(*rows, columns, dtype=torch.bool, device=bits.device)
    if mask.numel():
        over_blocks(_unpack_kernel, math.prod(rows), columns, bits.contiguous(), mask.view(torch.uint8), columns)
    return mask
