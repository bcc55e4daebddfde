"""Selection by one threshold in Triton: histograms of the keys' digits, then one pass that writes.

A program has a block of a row. Only integers are added, so no order of summation can show in the result.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits
from kernels.ops.mask_select.reference import reject_unordered
from kernels.ops.mask_select.triton import load_keys
from kernels.ops.mask_select_global.digits import BINS, DIGIT_BITS, select_by_digits
from kernels.ops.pack_bits.triton import block_of, over_blocks, store_packed


@triton.jit
def _digits_kernel(
    score_ptr, count_ptr, bad_ptr, stride_sn, stride_sk, K, prefix,
    SHIFT: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to ``count_ptr`` int64 ``[BINS]`` how many keys that begin with ``prefix`` have each digit, ``BITS`` bits
    from ``SHIFT`` on."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    key, bad = load_keys(score_ptr, None, None, stride_sn, stride_sk, 0, 0, 0, row, start, K, False, tl.uint32, BLOCK)
    if bad != 0:
        tl.store(bad_ptr, 1)
    counted = start + tl.arange(0, BLOCK) < K
    if SHIFT + BITS < 32:
        counted &= (key >> (SHIFT + BITS)).to(tl.int64) == prefix
    digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    found = tl.histogram(digit, BINS, mask=counted)
    tl.atomic_add(count_ptr + tl.arange(0, BINS), found.to(tl.int64), found > 0)


@triton.jit
def _equal_kernel(score_ptr, count_ptr, stride_sn, stride_sk, K, threshold, BLOCK: tl.constexpr):
    """How many scores of every block of every row equal ``threshold``, int64 ``[N, blocks]``."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    score = tl.load(score_ptr + row * stride_sn + columns * stride_sk, columns < K, 0)
    equal = (score == threshold) & (columns < K)
    tl.store(count_ptr + row * tl.num_programs(1) + block, tl.sum(equal.to(tl.int32)).to(tl.int64))


@triton.jit
def _threshold_kernel(
    score_ptr, room_ptr, bits_ptr, bad_ptr, stride_sn, stride_sk, K, threshold, TIES: tl.constexpr, BLOCK: tl.constexpr
):
    """Packed bits of a block; with ``TIES``, ``room_ptr`` int64 ``[N, blocks]`` says how many equal scores stay."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = block * BLOCK
    columns = start + tl.arange(0, BLOCK).to(tl.int64)
    score = tl.load(score_ptr + row * stride_sn + columns * stride_sk, columns < K, -float("inf"))
    # NaN is not below infinity.
    if tl.max((~(score < float("inf"))).to(tl.int32)) != 0:
        tl.store(bad_ptr, 1)
    kept = score > threshold
    if TIES:
        equal = ((score == threshold) & (columns < K)).to(tl.int32)
        room = tl.load(room_ptr + row * tl.num_programs(1) + block)
        kept |= (equal != 0) & (tl.cumsum(equal, 0) <= room)
    store_packed(bits_ptr + row * tl.cdiv(K, 8), start, K, kept, BLOCK)


def mask_select_threshold_triton(scores: Tensor, threshold: float, ties: int) -> Tensor:
    """See ``kernels.ops.mask_select_global.mask_select_threshold``."""
    bits = new_bits(scores)
    if bits.numel() == 0:
        return bits
    rows, columns = scores.shape
    bad = torch.zeros(1, dtype=torch.int32, device=scores.device)
    threshold = float(torch.tensor(threshold, dtype=torch.float32))
    where, room = (*scores.stride(), columns, threshold), None
    if ties:
        count = torch.empty(rows, triton.cdiv(columns, block_of(columns)), dtype=torch.int64, device=scores.device)
        over_blocks(_equal_kernel, rows, columns, scores, count, *where)
        room = ties - (count.flatten().cumsum(0).view(count.shape) - count)
    over_blocks(_threshold_kernel, rows, columns, scores, room, bits, bad, *where, TIES=ties > 0)
    if bad.item():
        reject_unordered("scores", scores)
    return bits


def mask_select_global_triton(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """See ``kernels.ops.mask_select_global.mask_select_global``."""
    return select_by_digits(scores, keep, _count, mask_select_threshold_triton)


def _count(scores: Tensor, level: int, prefix: int) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
    if scores.numel() == 0:
        return counts
    bad = torch.zeros(1, dtype=torch.int32, device=scores.device)
    digit = {"SHIFT": sum(DIGIT_BITS[level + 1 :]), "BITS": DIGIT_BITS[level], "BINS": BINS}
    arguments = scores, counts, bad, *scores.stride(), scores.shape[1], prefix
    over_blocks(_digits_kernel, *scores.shape, *arguments, **digit)
    if bad.item():
        reject_unordered("scores", scores)
    return counts
