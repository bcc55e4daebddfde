"""Row-wise mask selection in Triton: bisection on the bits of the scores, exact counts, packed store.

A row is one program. Scores become unsigned integers of the same order (with a tiebreak, 64 bits: score, then
tiebreak), and the threshold is built from its highest bit down: a bit stays where at least ``keep`` keys reach
the threshold with it. Only integers are added, so no order of summation can show in the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.mask_select.cpp import new_bits
from kernels.ops.mask_select.reference import mask_select_reference, mask_select_scores_reference
from kernels.ops.pack_bits.triton import store_packed

# The longest row of 32-bit keys that 16 warps hold without spilling; 32 warps have half the registers each.
LONGEST_RESIDENT = 16384
STREAM_BLOCK = 4096


@triton.jit
def _ordered(value):
    """uint32 in the order of the float32 ``value``; -0.0 and 0.0 are equal, and 0 is below every score."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    return tl.where(bits < 0x80000000, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def load_keys(
    score_ptr, channel_ptr, tiebreak_ptr, stride_sn, stride_sk, stride_ck, stride_tn, stride_tk, row, start, K,
    FUSED: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys ``[BLOCK]`` of a row's columns from ``start`` on, 0 past its end; and whether one is NaN or +infinity.

    ``FUSED``: the score is ``|W| a``, a float32 product rounded once. ``KEY`` uint64: a tiebreak follows the score.
    """
    inside = start + tl.arange(0, BLOCK) < K
    columns = start + tl.arange(0, BLOCK).to(tl.int64)
    score = tl.load(score_ptr + row * stride_sn + columns * stride_sk, inside, 0).to(tl.float32)
    if FUSED:
        score = tl.abs(score) * tl.load(channel_ptr + columns * stride_ck, inside, 0)
    # NaN is not below infinity.
    bad = ~(score < float("inf"))
    key = _ordered(score).to(KEY)
    if tl.uint64 == KEY:
        tiebreak = tl.load(tiebreak_ptr + row * stride_tn + columns * stride_tk, inside, 0)
        bad |= ~(tiebreak < float("inf"))
        key = (key << 32) | _ordered(tiebreak).to(KEY)
    return tl.where(inside, key, 0), tl.max(bad.to(tl.int32))


@triton.jit
def _with_bit(threshold, bit, KEY: tl.constexpr):
    return threshold | (tl.full((), 1, KEY) << bit.to(KEY))


@triton.jit
def _resident_kernel(
    score_ptr, channel_ptr, tiebreak_ptr, bits_ptr, bad_ptr, stride_sn, stride_sk, stride_ck, stride_tn, stride_tk,
    K, keep, FUSED: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row ``[K]`` of scores to a row ``[ceil(K / 8)]`` of packed bits; its keys stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    key, bad = load_keys(
        score_ptr, channel_ptr, tiebreak_ptr, stride_sn, stride_sk, stride_ck, stride_tn, stride_tk, row, 0, K,
        FUSED, KEY, BLOCK,
    )  # fmt: skip
    if bad != 0:
        tl.store(bad_ptr, 1)
    threshold = tl.full((), 0, KEY)
    reached = tl.zeros((), tl.int32) + K
    bit = tl.full((), KEY.primitive_bitwidth - 1, tl.int32)
    # Stops where exactly ``keep`` reach the threshold: on distinct scores that is long before the last bit.
    while (bit >= 0) & (reached != keep):
        candidate = _with_bit(threshold, bit, KEY)
        count = tl.sum((key >= candidate).to(tl.int32))
        if count >= keep:
            threshold, reached = candidate, count
        bit -= 1
    kept = key >= threshold
    if reached != keep:
        # The keys at the threshold are equal and too many: the leftmost stay.
        equal = key == threshold
        room = keep - tl.sum((key > threshold).to(tl.int32))
        kept = (key > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    store_packed(bits_ptr + row * tl.cdiv(K, 8), 0, K, kept & (key != 0), BLOCK)


@triton.jit
def _streamed_kernel(
    score_ptr, channel_ptr, tiebreak_ptr, bits_ptr, bad_ptr, stride_sn, stride_sk, stride_ck, stride_tn, stride_tk,
    K, keep, FUSED: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_resident_kernel``, for rows that registers cannot hold: read again, from the cache, for every bit."""
    row = tl.program_id(0).to(tl.int64)
    bits_ptr += row * tl.cdiv(K, 8)
    threshold = tl.full((), 0, KEY)
    reached = tl.zeros((), tl.int32) + K
    above = tl.full((), 0, tl.int32)
    bad = tl.full((), 0, tl.int32)
    bit = tl.full((), KEY.primitive_bitwidth - 1, tl.int32)
    while (bit >= 0) & (reached != keep):
        candidate = _with_bit(threshold, bit, KEY)
        count = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            key, _ = load_keys(
                score_ptr, channel_ptr, tiebreak_ptr, stride_sn, stride_sk, stride_ck, stride_tn, stride_tk, row,
                start, K, FUSED, KEY, BLOCK,
            )  # fmt: skip
            count += (key >= candidate).to(tl.int32)
        total = tl.sum(count)
        if total >= keep:
            threshold, reached = candidate, total
        else:
            above = total
        bit -= 1
    # After the last bit, the candidate refused last was the threshold plus 1: it counted the keys above.
    room = tl.where(reached == keep, K, keep - above)
    for start in range(0, K, BLOCK):
        key, unordered = load_keys(
            score_ptr, channel_ptr, tiebreak_ptr, stride_sn, stride_sk, stride_ck, stride_tn, stride_tk, row, start, K,
            FUSED, KEY, BLOCK,
        )  # fmt: skip
        bad |= unordered
        equal = ((key == threshold) & (key != 0)).to(tl.int32)
        kept = (key > threshold) | ((equal != 0) & (tl.cumsum(equal, 0) <= room))
        store_packed(bits_ptr, start, K, kept, BLOCK)
        room -= tl.sum(equal)
    if bad != 0:
        tl.store(bad_ptr, 1)


def block_of(columns: int, tiebreak: bool) -> tuple[int, int]:
    """Block size and warps for rows of ``columns``: keys in 32 registers of every thread, or, where the block is
    smaller than the row, streamed."""
    block = max(triton.next_power_of_2(columns), 32)
    if block > (LONGEST_RESIDENT // 2 if tiebreak else LONGEST_RESIDENT):
        return STREAM_BLOCK, 8
    return block, max(block * (2 if tiebreak else 1) // 1024, 1)


def mask_select_triton(weight: Tensor, channel_score: Tensor, keep: int) -> Tensor:
    """See ``kernels.ops.mask_select``."""
    bits, bad = _select(weight, channel_score, None, keep)
    # The reference names the value in its error.
    return mask_select_reference(weight, channel_score, keep) if bad else bits


def mask_select_scores_triton(scores: Tensor, keep: int, tiebreak: Tensor | None) -> Tensor:
    """See ``kernels.ops.mask_select``."""
    bits, bad = _select(scores, None, tiebreak, keep)
    return mask_select_scores_reference(scores, keep, tiebreak) if bad else bits


def _select(scores: Tensor, channel: Tensor | None, tiebreak: Tensor | None, keep: int) -> tuple[Tensor, bool]:
    """Packed bits, and whether a score or tiebreak was NaN or plus infinity (the one thing waited for)."""
    rows, columns = scores.shape
    bits = new_bits(scores)
    if bits.numel() == 0:
        return bits, False
    bad = torch.zeros(1, dtype=torch.int32, device=scores.device)
    block, warps = block_of(columns, tiebreak is not None)
    kernel = _resident_kernel if block >= columns else _streamed_kernel
    with torch.cuda.device_of(scores):
        kernel[(rows,)](
            scores, channel, tiebreak, bits, bad, *scores.stride(),
            *((0,) if channel is None else channel.stride()), *((0, 0) if tiebreak is None else tiebreak.stride()),
            columns, keep,
            FUSED=channel is not None, KEY=tl.uint32 if tiebreak is None else tl.uint64, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return bits, bool(bad.item())
