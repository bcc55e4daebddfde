"""Activation statistics of rows that hold several sequences: every span counts as a row of its own, bit for bit."""

import math

import pytest
import torch
from oracles import DTYPES, strided
from test_activation_stats import TOLERANCE, assert_close, batch_of, oracle, zero_sums
from torch.library import opcheck

from kernels import activation_stats, backends
from kernels.ops.activation_stats import COUNTED, IGNORED, SINK

SPANS = torch.tensor([[1, 4, 33], [0, 0, 5], [1, 0, 4], [0, 5, 5], [0, 6, 32]])
"""Over rows of 33 tokens: in no order, one empty, token 5 and 32 of row 0 in none."""


@pytest.fixture(params=["chosen", "reference"])
def _backend(request, monkeypatch):
    """What runs here by default (or is forced from outside), and the reference."""
    if request.param == "reference":
        monkeypatch.setenv(backends.ENVIRONMENT, "activation_stats=reference")


def packed(dtype, channels=37):
    """x ``[2, 33, K]`` with a sink in front of every span and gaps; outside of spans NaN that counts as counted."""
    x, role = torch.randn(2, 33, channels).to(dtype), torch.full((2, 33), COUNTED, dtype=torch.uint8)
    role[torch.rand(2, 33) < 0.2] = IGNORED
    outside = torch.ones(2, 33, dtype=torch.bool)
    for row, first, last in SPANS.tolist():
        outside[row, first:last] = False
        role[row, first : min(first + 1, last)] = SINK
    role[outside] = COUNTED
    x[outside | (role == IGNORED)] = math.nan
    return x, role, torch.tensor([3, 0, 1, 2, 3])


def alone(x, role, spans):
    """Each span as a batch of one row."""
    return [(x[b : b + 1, i:j], role[b : b + 1, i:j]) for b, i, j in spans.tolist()]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_sums(dtype):
    x, role, persona = packed(dtype)
    sums, expected = zero_sums(37), zero_sums(37)
    spoiled = activation_stats(x, role, persona, sums, SPANS)
    assert spoiled.tolist() == [False] * 5
    for s, (own_x, own_role) in enumerate(alone(x, role, SPANS)):
        expected += oracle(own_x, own_role, persona[s : s + 1])
    assert_close(sums, expected, TOLERANCE[dtype])


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_span_has_the_bits_of_a_row_of_its_own(dtype):
    x, role, _ = packed(dtype)
    together, apart, persona = zero_sums(37), zero_sums(37), torch.arange(5)
    activation_stats(x, role, persona, together, SPANS)
    for s, (own_x, own_role) in enumerate(alone(x, role, SPANS)):
        activation_stats(own_x.contiguous(), own_role, persona[s : s + 1], apart)
    assert torch.equal(together, apart)


def test_whole_rows_as_spans_have_the_bits_of_rows():
    x, role, persona = batch_of((5, 33, 129))
    rows, spans = zero_sums(129), zero_sums(129)
    activation_stats(x, role, persona, rows)
    activation_stats(x, role, persona, spans, torch.tensor([[b, 0, 33] for b in range(5)]))
    assert torch.equal(rows, spans)


@pytest.mark.usefixtures("_backend")
def test_overlapping_spans_both_count():
    x, role = torch.randn(1, 9, 5, dtype=torch.float64), torch.full((1, 9), COUNTED, dtype=torch.uint8)
    sums = zero_sums(5)
    activation_stats(x, role, torch.tensor([0, 1]), sums, torch.tensor([[0, 0, 6], [0, 2, 9]]))
    expected = oracle(x[:, :6], role[:, :6], torch.tensor([0])) + oracle(x[:, 2:], role[:, 2:], torch.tensor([1]))
    assert_close(sums, expected, 1e-12)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("shape", [(2, 33, 5), (0, 33, 5), (2, 0, 5), (2, 33, 0)], ids=str)
def test_no_spans(shape):
    x, role = torch.full(shape, math.nan), torch.full(shape[:2], COUNTED, dtype=torch.uint8)
    sums = zero_sums(shape[2])
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    assert activation_stats(x, role, nothing[:, 0], sums, nothing).tolist() == []
    if shape[0]:
        empty = torch.tensor([[1, shape[1], shape[1]]])
        assert activation_stats(x, role, torch.tensor([1]), sums, empty).tolist() == [False]
    assert not sums.any()


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e19])
@pytest.mark.parametrize("kind", [COUNTED, SINK])
def test_bad_value_flags_exactly_its_span(bad, kind):
    x, role, persona = packed(torch.float32)
    token = 4 + (role[1, 4:] == kind).nonzero()[-1].item()
    x[1, token, 36] = bad
    assert activation_stats(x, role, persona, zero_sums(37), SPANS).tolist() == [True, False, False, False, False]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_contiguous(dtype):
    x, role, persona = packed(dtype)
    plain, views = zero_sums(37), strided(zero_sums(37))
    activation_stats(x, role, persona, plain, SPANS)
    wide = torch.full((33, 2, 74), math.nan, dtype=dtype)
    wide[..., ::2] = x.transpose(0, 1)
    activation_stats(wide[..., ::2].transpose(0, 1), strided(role), strided(persona), views, strided(SPANS))
    assert_close(views, plain, 2e-6)


@pytest.mark.parametrize("span", [[2, 0, 1], [-1, 0, 1], [0, -1, 1], [0, 0, 34], [0, 5, 4], [0, -(2**62), 2**62]])
def test_spans_outside_of_x_are_named(span):
    x, role, _ = packed(torch.float32)
    message = rf"spans\[1\] must be a row in 0..1 and 0 <= first <= last <= 33, got \[{span[0]}, {span[1]}, {span[2]}\]"
    with pytest.raises(ValueError, match=message):
        activation_stats(x, role, torch.tensor([0, 0]), zero_sums(37), torch.tensor([[0, 0, 33], span]))


def test_input_is_checked():
    x, role, persona = packed(torch.float32)
    sums = zero_sums(37)
    with pytest.raises(ValueError, match=r"persona \[S\] must be \[5\], got \[4\]"):
        activation_stats(x, role, persona[:4], sums, SPANS)
    with pytest.raises(ValueError, match=r"spans \[S, 3\] must be \['S', 3\], got \[5, 2\]"):
        activation_stats(x, role, persona, sums, SPANS[:, :2])
    with pytest.raises(TypeError, match="spans must be one of int64, got .* int32"):
        activation_stats(x, role, persona, sums, SPANS.int())
    with pytest.raises(ValueError, match=r"persona must lie in 0\.\.4, got \[3, 0, 5, 2, 3\]"):
        activation_stats(x, role, persona.index_fill(0, torch.tensor([2]), 5), sums, SPANS)


@pytest.mark.parametrize("spans", [SPANS, SPANS[:0]], ids=["five", "none"])
def test_opcheck(spans):
    x, role, persona = packed(torch.bfloat16)
    opcheck(torch.ops.persona.activation_stats, (x.nan_to_num(), role, persona[: len(spans)], zero_sums(37), spans))


def test_compile(compiled):
    x, role, persona = packed(torch.float64)
    sums, expected = zero_sums(37), zero_sums(37)
    spoiled = compiled(lambda *args: activation_stats(*args).logical_not())(x, role, persona, sums, SPANS)
    activation_stats(x, role, persona, expected, SPANS)
    assert spoiled.tolist() == [True] * 5
    assert torch.equal(sums, expected)
