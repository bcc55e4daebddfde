"""Bit packing in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_bits_reference(mask: Tensor) -> Tensor:
    """byte[j] = sum_i mask[8 j + i] * 2^i, columns padded with False."""
    columns = mask.shape[-1]
    padded = F.pad(mask.to(torch.uint8), (0, -columns % 8))
    groups = padded.unflatten(-1, ((columns + 7) // 8, 8)) if columns else padded.new_empty((*mask.shape[:-1], 0, 8))
    weights = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (groups * weights).sum(-1, dtype=torch.uint8)


def unpack_bits_reference(bits: Tensor, columns: int) -> Tensor:
    """mask[8 j + i] = bit i of byte[j]."""
    table = _byte_table(bits.device)
    return table[bits.to(torch.int64)].flatten(-2)[..., :columns].contiguous()


def _byte_table(device: torch.device) -> Tensor:
    """The eight bits of every byte value, bool [256, 8]."""
    values = torch.arange(256, device=device).unsqueeze(1)
    return (values >> torch.arange(8, device=device)) & 1 == 1
