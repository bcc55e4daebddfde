"""Activation statistics against float64 loops over tokens."""

import math

import numpy as np
import pytest
import torch
from oracles import DTYPES, strided
from torch.library import opcheck

from kernels import activation_stats
from kernels.ops.activation_stats import COUNTED, FIELDS, IGNORED, SINK

PERSONAS = 5
SHAPES = [(1, 1, 1), (3, 7, 37), (5, 33, 129), (2, 300, 9), (0, 4, 5), (3, 0, 8), (2, 5, 0)]
TOLERANCE = dict.fromkeys(DTYPES, 2e-6) | {torch.float64: 1e-12}
"""Relative error of a sum: the project's bound where the sums inside a sequence are float32."""


def batch_of(shape, dtype=torch.float32):
    """x, role, persona: left padding of NaN, then a sink, then counted tokens with gaps; personas repeat."""
    batch, tokens, _ = shape
    x, role = torch.randn(shape).to(dtype), torch.full((batch, tokens), COUNTED, dtype=torch.uint8)
    role[torch.rand(batch, tokens) < 0.2] = IGNORED
    for b in range(batch):
        start = min(b, tokens)
        role[b, :start] = IGNORED
        role[b, start : start + 1] = SINK
    x[role == IGNORED] = math.nan
    return x, role, torch.arange(batch) % 3 + 1


def zero_sums(channels, personas=PERSONAS):
    return torch.zeros(personas, len(FIELDS), channels, dtype=torch.float64)


def oracle(x, role, persona, personas=PERSONAS):
    sums = np.zeros((personas, len(FIELDS), x.shape[2]))
    values = x.double().numpy()
    for b, p in enumerate(persona.tolist()):
        moments = {kind: np.zeros((3, x.shape[2])) for kind in (COUNTED, SINK)}
        for t, kind in enumerate(role[b].tolist()):
            if kind != IGNORED:
                v = values[b, t]
                moments[kind] += np.stack([v * v, np.abs(v), v])
        mean_square = moments[COUNTED][0] / max(role[b].tolist().count(COUNTED), 1)
        sums[p] += np.stack([np.sqrt(mean_square), mean_square, *moments[COUNTED], *moments[SINK]])
    return torch.from_numpy(sums)


def assert_close(sums, expected, tolerance):
    """Relative to the sum itself; signed sums cancel, so they are measured by the sum of magnitudes."""
    scale = expected.clone()
    for name in ("signed", "sink_signed"):
        scale[:, FIELDS.index(name)] = expected[:, FIELDS.index(name.replace("signed", "abs"))]
    difference = (sums - expected).abs()
    assert (difference <= tolerance * scale).all(), f"relative error {(difference / scale).nan_to_num().max():.3g}"


def test_field_order_is_fixed():
    # Files on disk hold these rows by position.
    assert FIELDS == ("rms", "ms", "square", "abs", "signed", "sink_square", "sink_abs", "sink_signed")
    assert (IGNORED, COUNTED, SINK) == (0, 1, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, dtype):
    x, role, persona = batch_of(shape, dtype)
    sums = zero_sums(shape[2])
    spoiled = activation_stats(x, role, persona, sums)
    assert spoiled.dtype == torch.bool
    assert spoiled.tolist() == [False] * shape[0]
    assert_close(sums, oracle(x, role, persona), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_values_of_a_long_sequence(dtype):
    x = torch.randn(2, 2049, 33) * torch.logspace(-3, 3.5, 33)
    x, role = x.to(dtype), torch.full((2, 2049), COUNTED, dtype=torch.uint8)
    sums, persona = zero_sums(33), torch.tensor([0, 4])
    assert not activation_stats(x, role, persona, sums).any()
    assert_close(sums, oracle(x, role, persona), 2e-6)


def test_sums_accumulate_over_calls():
    x, role, persona = batch_of((3, 7, 37), torch.float64)
    sums = zero_sums(37) + 3
    activation_stats(x, role, persona, sums)
    activation_stats(2 * x, role, persona, sums)
    expected = 3 + oracle(x, role, persona) + oracle(2 * x, role, persona)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


def test_batch_split_gives_the_same_sums():
    x, role, persona = batch_of((7, 33, 37), torch.float64)
    whole, parts = zero_sums(37), zero_sums(37)
    activation_stats(x, role, persona, whole)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        activation_stats(x[part], role[part], persona[part], parts)
    assert_close(parts, whole, 1e-12)


def test_two_runs_are_bit_identical():
    # What a user runs: not PyTorch's deterministic replacements.
    torch.use_deterministic_algorithms(False)
    x, role, persona = batch_of((16, 257, 129), torch.bfloat16)
    first, second = zero_sums(129), zero_sums(129)
    activation_stats(x, role, persona, first)
    activation_stats(x, role, persona, second)
    assert torch.equal(first, second)


def test_personas_repeated_and_absent():
    x, role, _ = batch_of((4, 9, 5), torch.float64)
    persona = torch.tensor([3, 0, 3, 3])
    sums = zero_sums(5)
    sums[[1, 2, 4]] = math.nan
    activation_stats(x, role, persona, sums)
    assert sums[[1, 2, 4]].isnan().all()
    assert_close(sums[[0, 3]], oracle(x, role, persona)[[0, 3]], 1e-12)


def test_sequence_without_counted_tokens():
    x, role, persona = batch_of((3, 7, 9), torch.float64)
    role[0], x[0] = IGNORED, math.nan
    role[1] = IGNORED
    role[1, 2] = SINK
    x[1, 2] = -2.0
    sums = zero_sums(9)
    assert not activation_stats(x, role, persona, sums).any()
    assert torch.equal(sums[1], torch.zeros(8, 9, dtype=torch.float64))
    assert sums[2].mean(1).tolist() == [0, 0, 0, 0, 0, 4, 2, -2]


def test_sink_counts_only_as_sink():
    x = torch.tensor([[[3.0], [-4.0], [5.0]]])
    sums = zero_sums(1, personas=1)
    activation_stats(x, torch.tensor([[SINK, COUNTED, COUNTED]], dtype=torch.uint8), torch.tensor([0]), sums)
    expected = torch.tensor([math.sqrt(20.5), 20.5, 41, 9, 1, 9, 3, 3], dtype=torch.float64)
    torch.testing.assert_close(sums.flatten(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e19])
@pytest.mark.parametrize("kind", [COUNTED, SINK])
def test_bad_value_flags_exactly_its_sequence(bad, kind):
    x, role, persona = batch_of((5, 9, 37))
    token = (role[3] == kind).nonzero()[0].item()
    x[3, token, 36] = bad
    assert activation_stats(x, role, persona, zero_sums(37)).tolist() == [False, False, False, True, False]


def test_square_overflow_is_none_in_float64():
    x, role, persona = batch_of((5, 9, 37), torch.float64)
    assert not activation_stats(x * 1e30, role, persona, zero_sums(37)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype):
    x, role, persona = batch_of((3, 9, 37), dtype)
    sums = strided(zero_sums(37))
    wide = torch.full((9, 3, 74), math.nan, dtype=dtype)
    wide[..., ::2] = x.transpose(0, 1)
    activation_stats(wide[..., ::2].transpose(0, 1), strided(role), strided(persona), sums)
    assert_close(sums, oracle(x, role, persona), 2e-6)


def test_input_is_checked():
    x, role, persona = batch_of((2, 3, 5))
    sums = zero_sums(5)
    for index in (-1, PERSONAS):
        with pytest.raises(ValueError, match=rf"persona must lie in 0\.\.4, got \[0, {index}\]"):
            activation_stats(x, role, torch.tensor([0, index]), sums)
    with pytest.raises(ValueError, match=r"role \[B, T\] must be \[2, 3\], got \[3, 2\]"):
        activation_stats(x, role.T, persona, sums)
    with pytest.raises(ValueError, match=r"sums \[P, 8, K\] must be \['P', 8, 5\], got \[5, 8, 6\]"):
        activation_stats(x, role, persona, zero_sums(6))
    with pytest.raises(TypeError, match="sums must be one of float64, got .* float32"):
        activation_stats(x, role, persona, sums.float())
    with pytest.raises(TypeError, match="role must be one of uint8, got .* bool"):
        activation_stats(x, role.bool(), persona, sums)


@pytest.mark.parametrize("shape", [(3, 7, 37), (0, 4, 5), (1, 1, 1)], ids=str)
def test_opcheck(shape):
    x, role, persona = batch_of(shape, torch.bfloat16)
    opcheck(torch.ops.persona.activation_stats, (x.nan_to_num(), role, persona, zero_sums(shape[2])))


def test_compile(compiled):
    x, role, persona = batch_of((3, 7, 37), torch.float64)
    sums = zero_sums(37)
    spoiled = compiled(lambda *args: activation_stats(*args).logical_not())(x, role, persona, sums)
    assert spoiled.all()
    assert_close(sums, oracle(x, role, persona), 1e-12)
