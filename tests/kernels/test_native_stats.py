"""Activation statistics in C++ against the reference, for every instruction set."""

import math

import numpy as np
import pytest
import torch
from oracles import DTYPES, assert_as_accurate, strided

from kernels.ops.activation_stats import COUNTED, FIELDS, IGNORED, SINK
from kernels.ops.activation_stats.cpp import activation_stats_cpp
from kernels.ops.activation_stats.reference import activation_stats_reference

SHAPES = [
    (1, 1, 1),
    (2, 9, 7),
    (3, 17, 63),
    (3, 70, 65),
    (2, 131, 577),
    (1, 3, 2048),
    (2, 5, 2085),
    (0, 4, 5),
    (3, 0, 8),
    (2, 5, 0),
]
PERSONAS = 4


def batch_of(shape, dtype):
    """Left padding of NaN, a sink, counted tokens with gaps; the last of three sequences holds no counted token."""
    batch, tokens, _ = shape
    x, role = torch.randn(shape).to(dtype), torch.full((batch, tokens), COUNTED, dtype=torch.uint8)
    role[torch.rand(batch, tokens) < 0.2] = IGNORED
    for b in range(batch):
        start = min(b, tokens)
        role[b, :start] = IGNORED
        role[b, start : start + 1] = SINK
    if batch == 3:
        role[2] = IGNORED
    x[role == IGNORED] = math.nan
    return x, role, (torch.arange(batch) * 2) % PERSONAS


def run(function, x, role, persona):
    sums = torch.zeros(PERSONAS, len(FIELDS), x.shape[2], dtype=torch.float64)
    return function(x, role, persona, sums), sums


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_the_reference(isa, shape, dtype):
    x, role, persona = batch_of(shape, dtype)
    _, plain = run(activation_stats_reference, x, role, persona)
    _, oracle = run(activation_stats_reference, x.double(), role, persona)
    spoiled, sums = run(activation_stats_cpp, x, role, persona)
    assert spoiled.dtype == torch.bool
    assert spoiled.tolist() == [False] * shape[0]
    # The sums lie in float64 whatever x is: what is compared is the arithmetic in front of them. float64 x has no
    # finer oracle than the reference itself.
    rounding = 1e-14 if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2
    for field, name in enumerate(FIELDS) if oracle.numel() else ():
        expected = oracle[:, field]
        allowed = 2 * (plain[:, field] - expected).abs().max() + rounding * expected.abs().max()
        assert (sums[:, field] - expected).abs().max() <= allowed, name
    assert sums.isfinite().all()


def test_one_long_sequence(isa):
    x = torch.randn(1, 4099, 96) + 1
    role, persona = torch.full((1, 4099), COUNTED, dtype=torch.uint8), torch.tensor([1])
    _, oracle = run(activation_stats_reference, x.double(), role, persona)
    _, sums = run(activation_stats_cpp, x, role, persona)
    torch.testing.assert_close(sums, oracle, rtol=2e-6, atol=0)
    _, plain = run(activation_stats_reference, x, role, persona)
    assert_as_accurate(sums[1], plain[1], oracle[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_runs_change_no_bit(isa, threads, dtype):
    x, role, persona = batch_of((4, 257, 577), dtype)
    results = []
    for count in (1, 2, 3, 7, 1):
        threads(count)
        results.append(run(activation_stats_cpp, x, role, persona))
    for spoiled, sums in results[1:]:
        assert torch.equal(spoiled, results[0][0])
        assert torch.equal(sums, results[0][1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_layout_changes_no_bit(isa, dtype):
    x, role, persona = batch_of((3, 33, 65), dtype)
    _, expected = run(activation_stats_cpp, x, role, persona)
    wide = torch.full((33, 3, 130), math.nan, dtype=dtype)
    wide[..., ::2] = x.transpose(0, 1)
    views = [
        wide[..., ::2].transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], dim=2)[..., :65],
        strided(x.nan_to_num()),
    ]
    for view in views:
        sums = strided(torch.zeros(PERSONAS, len(FIELDS), 65, dtype=torch.float64))
        activation_stats_cpp(view, strided(role), strided(persona), sums)
        assert torch.equal(sums, expected)


@pytest.mark.parametrize("column", [0, 31, 64, 2047, 2048, 2099])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e19])
def test_bad_value_is_found_in_every_channel(isa, threads, bad, column):
    threads(3)
    x, role, persona = batch_of((4, 70, 2100), torch.float32)
    x[2, (role[2] == COUNTED).nonzero()[-1], column] = bad
    spoiled, _ = run(activation_stats_cpp, x, role, persona)
    assert spoiled.tolist() == [False, False, True, False]


PACKED = [[1, 0, 70], [0, 3, 3], [2, 5, 133], [0, 0, 1], [1, 70, 257], [0, 1, 200], [2, 4, 12]]
"""Spans in no order; two overlap, one is empty, one lies in the padding that ``batch_of`` gives its third row."""


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_spans_have_the_bits_of_a_padded_batch(isa, threads, dtype):
    x, role, _ = batch_of((3, 257, 577), dtype)
    persona, longest = torch.arange(len(PACKED)) % PERSONAS, max(last - first for _, first, last in PACKED)
    padded = torch.full((len(PACKED), longest, 577), math.nan, dtype=dtype)
    roles = torch.full((len(PACKED), longest), IGNORED, dtype=torch.uint8)
    for s, (row, first, last) in enumerate(PACKED):
        padded[s, : last - first], roles[s, : last - first] = x[row, first:last], role[row, first:last]
    expected = run(activation_stats_cpp, padded, roles, persona)
    for count in (1, 3):
        threads(count)
        sums = torch.zeros_like(expected[1])
        spoiled = activation_stats_cpp(x, role, persona, sums, strided(torch.tensor(PACKED)))
        assert torch.equal(spoiled, expected[0])
        assert torch.equal(sums, expected[1])


def test_offsets_past_32_bits(isa):
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**31 + 16
    # Pages that nobody writes take no memory.
    x = torch.from_numpy(np.zeros(stride + 2**17, dtype=np.float16)).as_strided((2, 2, 65536), (stride, 65536, 1))
    x[1] = torch.randn(2, 65536)
    role, persona = torch.ones(2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    _, oracle = run(activation_stats_reference, x.double(), role, persona)
    _, sums = run(activation_stats_cpp, x, role, persona)
    torch.testing.assert_close(sums, oracle, rtol=2e-6, atol=1e-12)


def test_millions_of_tokens(isa):
    x, role = torch.tensor([0.1, -3.0, 7e4]).expand(1, 2_000_003, 3), torch.ones(1, 2_000_003, dtype=torch.uint8)
    _, sums = run(activation_stats_cpp, x, role, torch.tensor([1]))
    value = x[0, 0].double()
    square, count = value.square(), x.shape[1]
    expected = torch.stack([square.sqrt(), square, square * count, value.abs() * count, value * count])
    torch.testing.assert_close(sums[1, :5], expected, rtol=2e-6, atol=0)


def test_unknown_roles_are_ignored(isa):
    x, role, persona = batch_of((1, 3, 5), torch.float32)
    x[:], role[:] = math.nan, torch.tensor([3, 255, IGNORED])
    spoiled, sums = run(activation_stats_cpp, x, role, persona)
    assert not spoiled.any()
    assert not sums.any()


def test_direct_calls_are_checked():
    op = torch.ops.persona_native.activation_stats
    x, role, persona = batch_of((2, 3, 5), torch.float32)
    sums = torch.zeros(PERSONAS, 8, 5, dtype=torch.float64)
    for bad in (
        (x[0], role, persona, sums, None),
        (x, role[:, :2], persona, sums, None),
        (x, role, persona + 9, sums, None),
        (x, role, persona, sums[..., :4], None),
        (x.int(), role, persona, sums, None),
        (x, role, persona, sums, torch.tensor([[0, 0, 4], [0, 0, 1]])),
        (x, role, persona, sums, torch.tensor([[0, 0, 1]])),
        (x, role, persona, sums, torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0]])),
    ):
        with pytest.raises(RuntimeError):
            op(*bad)
