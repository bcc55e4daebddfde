"""N:M mask selection in Triton: every weight counts those of its group that go before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits
from kernels.ops.mask_select.triton import load_keys
from kernels.ops.mask_select_nm.reference import mask_select_nm_reference
from kernels.ops.pack_bits.triton import over_blocks, store_packed


@triton.jit
def _nm_kernel(
    score_ptr, channel_ptr, bits_ptr, bad_ptr, stride_sn, stride_sk, stride_ck, K, n,
    M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row of weights to its packed bits; ``M`` columns are a group."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    key, bad = load_keys(
        score_ptr, channel_ptr, None, stride_sn, stride_sk, stride_ck, 0, 0, row, start, K, True, tl.uint32, BLOCK
    )
    if bad != 0:
        tl.store(bad_ptr, 1)
    groups = key.reshape(BLOCK // M, M)
    place = tl.arange(0, M)
    own, other = groups[:, :, None], groups[:, None, :]
    # Equal scores: the lower column goes first.
    before = (other > own) | ((other == own) & (place[None, None, :] < place[None, :, None]))
    kept = tl.sum(before.to(tl.int32), 2) < n
    store_packed(bits_ptr + row * tl.cdiv(K, 8), start, K, kept.reshape(BLOCK) & (key != 0), BLOCK)


def mask_select_nm_triton(weight: Tensor, channel_score: Tensor, n: int, m: int) -> Tensor:
    """See ``kernels.ops.mask_select_nm``."""
    bits = new_bits(weight)
    if bits.numel() == 0:
        return bits
    bad = torch.zeros(1, dtype=torch.int32, device=weight.device)
    strides = *weight.stride(), *channel_score.stride()
    over_blocks(_nm_kernel, *weight.shape, weight, channel_score, bits, bad, *strides, weight.shape[1], n, M=m)
    # The reference names the value in its error.
    return mask_select_nm_reference(weight, channel_score, n, m) if bad.item() else bits
