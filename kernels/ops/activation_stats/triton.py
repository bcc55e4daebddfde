"""Activation statistics in Triton: one read of x, no atomics, the same bits in every run.

A sequence is a row of x, or a span of one. Three stages. A split of a sequence (``SPLIT`` tokens) and a block of
channels make one program of the first, which leaves three moments in float32; the second adds the splits of a
sequence, and is left out where there is one; the third turns moments into statistics and adds the sequences of a
persona.
Every sum has the same form: ``LANES`` running sums, element i in lane i mod LANES, then the halves of the
lanes on top of each other. Two numbers have one sum, so the result depends on the values alone and
not on block sizes, warps or the device; float32 input apart, where a multiply-add may be fused.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops.activation_stats.reference import FIELDS

# Tokens that a program sums in float32; their sums cost 12 bytes a channel, written and read again.
SPLIT = tl.constexpr(256)
LANES = tl.constexpr(8)
COUNTED, SINK = tl.constexpr(1), tl.constexpr(2)
MOMENTS = tl.constexpr(3)
FIELD_COUNT = tl.constexpr(len(FIELDS))
# Channels of a program of the second and third stage.
FOLD_BLOCK = 64


@triton.jit
def _halve(tile):
    """``[R, C]`` -> ``[R / 2, C]``: row i plus row i + R / 2."""
    return tl.sum(tile.reshape(2, tile.shape[0] // 2, tile.shape[1]), 0)


@triton.jit
def _fold(tile):
    """The sum over the 8 rows of ``tile`` ``[8, C]``, in an order that no layout changes: ``[C]``."""
    return tl.sum(_halve(_halve(tile)), 0)


@triton.jit
def _moments(
    x_ptr, role_ptr, stride_xt, stride_xk, stride_rt, first, last, columns, K, kind: tl.constexpr,
    WORK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of x^2, |x| and x over the tokens first..last-1 whose role is ``kind``, each ``[BLOCK_K]``."""
    square = tl.zeros((LANES, BLOCK_K), WORK)
    magnitude = tl.zeros((LANES, BLOCK_K), WORK)
    signed = tl.zeros((LANES, BLOCK_K), WORK)
    for start in range(first, last, LANES):
        tokens = start + tl.arange(0, LANES).to(tl.int64)
        role = tl.load(role_ptr + tokens * stride_rt, tokens < last, 0)
        # Other tokens are not read at all: padding costs no bytes, and its NaN cannot matter.
        read = (role == kind)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * stride_xt + columns[None, :] * stride_xk, read, 0).to(WORK)
        square += x * x
        magnitude += tl.abs(x)
        signed += x
    return _fold(square), _fold(magnitude), _fold(signed)


@triton.jit
def _store_moments(moment_ptr, K, columns, square, magnitude, signed):
    inside = columns < K
    tl.store(moment_ptr + columns, square, inside)
    tl.store(moment_ptr + K + columns, magnitude, inside)
    tl.store(moment_ptr + 2 * K + columns, signed, inside)


@triton.jit
def _split_kernel(
    x_ptr, role_ptr, persona_ptr, span_ptr, moment_ptr, count_ptr, bad_ptr,
    stride_xb, stride_xt, stride_xk, stride_rb, stride_rt, stride_ps, T, K, splits, personas,
    WORK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Moments ``[S, splits, 6, K]``, counts int32 ``[S, splits, 2]`` (counted, sink) of one split and channel block."""
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    item = (tl.program_id(0) // blocks).to(tl.int64)
    s, split = item // splits, item % splits
    row, first = s, split * SPLIT
    if span_ptr is None:
        last = tl.minimum(first + SPLIT, T)
    else:
        row = tl.load(span_ptr + 3 * s)
        first += tl.load(span_ptr + 3 * s + 1)
        last = tl.minimum(first + SPLIT, tl.load(span_ptr + 3 * s + 2))
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptr += row * stride_xb
    role_ptr += row * stride_rb
    moment_ptr += item * 2 * MOMENTS * K

    tokens = first + tl.arange(0, SPLIT).to(tl.int64)
    role = tl.load(role_ptr + tokens * stride_rt, tokens < last, 0)
    counted, sinks = tl.sum((role == COUNTED).to(tl.int32)), tl.sum((role == SINK).to(tl.int32))
    if block == 0:
        tl.store(count_ptr + 2 * item, counted)
        tl.store(count_ptr + 2 * item + 1, sinks)

    square, magnitude, signed = _moments(
        x_ptr, role_ptr, stride_xt, stride_xk, stride_rt, first, last, columns, K, COUNTED, WORK, BLOCK_K
    )
    _store_moments(moment_ptr, K, columns, square, magnitude, signed)
    # The other sums are finite where the sum of squares is. NaN is not below infinity.
    bad = tl.max((~(square < float("inf"))).to(tl.int32)) != 0
    # Few splits hold a sink: the others neither sum nor store, and nobody reads their part.
    if sinks > 0:
        square, magnitude, signed = _moments(
            x_ptr, role_ptr, stride_xt, stride_xk, stride_rt, first, last, columns, K, SINK, WORK, BLOCK_K
        )
        _store_moments(moment_ptr + MOMENTS * K, K, columns, square, magnitude, signed)
        bad |= tl.max((~(square < float("inf"))).to(tl.int32)) != 0
    persona = tl.load(persona_ptr + s * stride_ps)
    # Many programs may store the flag of a sequence, all of them the same value.
    if bad | (persona < 0) | (persona >= personas):
        tl.store(bad_ptr + s, 1)


@triton.jit
def _combine_kernel(part_ptr, part_count_ptr, moment_ptr, count_ptr, bad_ptr, K, splits, BLOCK_K: tl.constexpr):
    """``[S, splits, 6, K]`` and ``[S, splits, 2]`` -> ``[S, 6, K]`` and ``[S, 2]``, added in float64."""
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    item = (tl.program_id(0) // blocks).to(tl.int64)
    s, moment = item // (2 * MOMENTS), item % (2 * MOMENTS)
    sink = moment // MOMENTS
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    total = tl.zeros((LANES, BLOCK_K), tl.float64)
    tokens = tl.zeros((LANES,), tl.int32)
    for start in range(0, splits, LANES):
        split = start + tl.arange(0, LANES)
        count = tl.load(part_count_ptr + (s * splits + split) * 2 + sink, split < splits, 0)
        tokens += count
        rows = part_ptr + ((s * splits + split) * 2 * MOMENTS + moment) * K
        read = (count > 0)[:, None] & (columns < K)[None, :]
        total += tl.load(rows[:, None] + columns[None, :], read, 0).to(tl.float64)
    value = _fold(total).to(moment_ptr.dtype.element_ty)
    tl.store(moment_ptr + item * K + columns, value, columns < K)
    if (block == 0) & (moment % MOMENTS == 0):
        tl.store(count_ptr + 2 * s + sink, tl.sum(tokens))
    # Parts that are finite may add up to more than float32 holds.
    if tl.max((~(tl.abs(value) < float("inf"))).to(tl.int32)) != 0:
        tl.store(bad_ptr + s, 1)


@triton.jit
def _persona_kernel(
    moment_ptr, count_ptr, persona_ptr, sums_ptr, stride_ps, stride_sp, stride_sf, stride_sk, sequences, K,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add one field of a persona's sequences, from moments ``[S, 6, K]``, to ``sums`` ``[P, 8, K]``."""
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    field = tl.program_id(0) // blocks % FIELD_COUNT
    persona = (tl.program_id(0) // blocks // FIELD_COUNT).to(tl.int64)
    # rms, ms and square come from the first moment; the other fields follow the moments.
    moment = tl.maximum(field - 2, 0)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    total = tl.zeros((LANES, BLOCK_K), tl.float64)
    owned = tl.zeros((LANES,), tl.int32)
    for start in range(0, sequences, LANES):
        s = start + tl.arange(0, LANES).to(tl.int64)
        mine = tl.load(persona_ptr + s * stride_ps, s < sequences, -1) == persona
        owned += mine.to(tl.int32)
        count = tl.load(count_ptr + 2 * s + moment // MOMENTS, mine, 0)
        rows = moment_ptr + (s * 2 * MOMENTS + moment) * K
        read = (mine & (count > 0))[:, None] & (columns < K)[None, :]
        value = tl.load(rows[:, None] + columns[None, :], read, 0).to(tl.float64)
        mean = value / tl.maximum(count, 1).to(tl.float64)[:, None]
        if field == 0:
            value = tl.sqrt(mean)
        elif field == 1:
            value = mean
        total += value
    if tl.max(owned) > 0:
        target = sums_ptr + persona * stride_sp + field * stride_sf + columns * stride_sk
        tl.store(target, tl.load(target, columns < K, 0) + _fold(total), columns < K)


def split_block(dtype: torch.dtype) -> int:
    """Channels of a program of the first stage: 16 bytes a thread, so that one warp reads 512 bytes of a token."""
    return 512 // dtype.itemsize


def activation_stats_triton(
    x: Tensor, role: Tensor, persona: Tensor, sums: Tensor, spans: Tensor | None = None
) -> Tensor:
    """See ``kernels.ops.activation_stats``. Never waits for the device. Spans take the programs and the room of the
    padded batch that they replace."""
    (S,), (_, T, K) = persona.shape, x.shape
    bad = torch.zeros(S, dtype=torch.bool, device=x.device)
    if spans is not None and S:
        T = int((spans[:, 2] - spans[:, 1]).max())
        spans = spans.contiguous().to(x.device, non_blocking=True)
    if 0 in (S, T, K):
        return bad
    splits = triton.cdiv(T, SPLIT.value)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    moments = torch.empty(S, splits, 6, K, dtype=work, device=x.device)
    counts = torch.empty(S, splits, 2, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        block = split_block(x.dtype)
        _split_kernel[(S * splits * triton.cdiv(K, block),)](
            x, role, persona, spans, moments, counts, bad, *x.stride(), *role.stride(), *persona.stride(),
            T, K, splits, sums.shape[0],
            WORK=tl.float64 if work == torch.float64 else tl.float32, BLOCK_K=block,
        )  # fmt: skip
        blocks = triton.cdiv(K, FOLD_BLOCK)
        if splits > 1:
            parts, part_counts = moments, counts
            moments, counts = parts.new_empty(S, 6, K), part_counts.new_empty(S, 2)
            _combine_kernel[(S * 6 * blocks,)](parts, part_counts, moments, counts, bad, K, splits, BLOCK_K=FOLD_BLOCK)
        _persona_kernel[(sums.shape[0] * len(FIELDS) * blocks,)](
            moments, counts, persona, sums, *persona.stride(), *sums.stride(), S, K,
            BLOCK_K=FOLD_BLOCK,
        )  # fmt: skip
    return bad
