"""Fused activation statistics: one read of a layer's input, folded into float64 sums per persona."""

import torch
from torch import Tensor

from kernels import backends, native, triton_backend
from kernels.ops import checks
from kernels.ops.activation_stats.cpp import activation_stats_cpp
from kernels.ops.activation_stats.reference import FIELDS, activation_stats_reference
from kernels.ops.eager import plain

IGNORED, COUNTED, SINK = 0, 1, 2
"""Roles of a token: left out, counted, or the attention sink (the sequence's first token)."""

__all__ = ["COUNTED", "FIELDS", "IGNORED", "SINK", "activation_stats"]


def activation_stats(x: Tensor, role: Tensor, persona: Tensor, sums: Tensor, spans: Tensor | None = None) -> Tensor:
    """Add the statistics of a batch of sequences to the sums of their personas.

    A sequence is a row of ``x``, or with ``spans`` a part of one, and is measured alike: a span has, bit for bit, the
    statistics of its tokens as a row of their own. Spans are a table of borders, not an index per token, so that a
    sequence is known to lie together and every backend reads x once, in order.

    Args:
        x: layer input ``[B, T, K]``, any strides, float32, bfloat16, float16 or float64.
        role: uint8 ``[B, T]``: 0 ignored (padding, template), 1 counted, 2 attention sink.
            ``x`` may hold anything, NaN too, where the role is 0.
        persona: int64 ``[B]``, the row of ``sums`` that each sequence belongs to; with spans ``[S]``.
        sums: float64 ``[P, 8, K]``, added to in place. With ``ms_b`` and ``rms_b`` the mean square
            and its root over the counted tokens of sequence b, the rows (``FIELDS``) are
            0 ``rms``: sum_b rms_b; 1 ``ms``: sum_b ms_b; 2 ``square``: sum_bt x^2; 3 ``abs``: sum_bt |x|;
            4 ``signed``: sum_bt x; 5, 6, 7 ``sink_square``, ``sink_abs``, ``sink_signed``: the last
            three over the sink tokens instead (one a sequence, so its rms sums are rows 6 and 5).
        spans: int64 ``[S, 3]``, for rows that hold several sequences: row of ``x``, first token, and the token behind
            the last (``first == last`` is a sequence without tokens). Tokens in no span are left out; a token in two
            counts in both. On the CPU whatever the device of ``x``: the longest span decides how a GPU is launched.

    Returns:
        bool ``[B]``, with spans ``[S]``: sequences whose counted or sink tokens held NaN, infinity or values whose
        square overflows; the sums are then spoiled and the caller has to stop.

    Raises ValueError if a persona or the tokens of a span do not exist. A GPU backend must not wait for the values
    of ``persona``: it adds such a sequence to nothing and returns True for it.
    """
    if plain(x):
        return _compute(x, role, persona, sums, spans)
    return _op(x, role, persona, sums, spans)


def _compute(x: Tensor, role: Tensor, persona: Tensor, sums: Tensor, spans: Tensor | None = None) -> Tensor:
    op = "activation_stats"
    checks.dtype(op, "x", x, checks.FLOATS)
    checks.shape(op, "x", x, (None, None, None), "[B, T, K]")
    batch, tokens, channels = x.shape
    checks.dtype(op, "role", role, (torch.uint8,))
    checks.shape(op, "role", role, (batch, tokens), "[B, T]")
    checks.dtype(op, "persona", persona, (torch.int64,))
    if spans is None:
        checks.shape(op, "persona", persona, (batch,), "[B]")
    else:
        checks.dtype(op, "spans", spans, (torch.int64,))
        checks.shape(op, "spans", spans, (None, 3), "[S, 3]")
        checks.shape(op, "persona", persona, (spans.shape[0],), "[S]")
        _check_spans(spans, batch, tokens)
    checks.dtype(op, "sums", sums, (torch.float64,))
    checks.shape(op, "sums", sums, (None, len(FIELDS), channels), "[P, 8, K]")
    checks.same_device(op, x=x, role=role, persona=persona, sums=sums)
    function = backends.implementation(op, x.device.type)
    if x.device.type == "cpu" or function is activation_stats_reference:
        _check_personas(persona, sums.shape[0])
    return function(x, role, persona, sums, spans)


def _check_personas(persona: Tensor, count: int) -> None:
    # One copy to a list, instead of two reductions: this runs at every layer of every batch.
    owners = persona.tolist()
    if owners and (min(owners) < 0 or max(owners) >= count):
        raise ValueError(f"activation_stats: persona must lie in 0..{count - 1}, got {owners}")


def _check_spans(spans: Tensor, batch: int, tokens: int) -> None:
    if spans.device.type != "cpu":
        raise ValueError(f"activation_stats: spans must be on the CPU, got {checks.describe(spans)}")
    for index, (row, first, last) in enumerate(spans.tolist()):
        if not (0 <= row < batch and 0 <= first <= last <= tokens):
            raise ValueError(
                f"activation_stats: spans[{index}] must be a row in 0..{batch - 1} and 0 <= first <= last <= {tokens},"
                f" got {[row, first, last]}"
            )


_op = torch.library.custom_op("persona::activation_stats", _compute, mutates_args=("sums",))


@_op.register_fake
def _(x: Tensor, role: Tensor, persona: Tensor, sums: Tensor, spans: Tensor | None = None) -> Tensor:
    return x.new_empty((persona.shape[0],), dtype=torch.bool)


backends.register("activation_stats", "reference", activation_stats_reference)
native.register("activation_stats", activation_stats_cpp, cuda=activation_stats_cpp)
triton_backend.register("activation_stats", "kernels.ops.activation_stats.triton", "activation_stats_triton")
