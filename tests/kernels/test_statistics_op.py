"""Activation statistics against a float64 loop."""

import pytest
import torch

import kernels
from kernels.ops.activation_stats import COUNTED, FIELDS, IGNORED, SINK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loop(x, role, persona, personas):
    """The definition, sequence by sequence in float64."""
    sums = torch.zeros(personas, len(FIELDS), x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        chosen = x[b][role[b] == COUNTED].double()
        sink = x[b][role[b] == SINK].double()
        mean = chosen.square().sum(0) / max(len(chosen), 1)
        rows = [mean.sqrt(), mean, chosen.square().sum(0), chosen.abs().sum(0), chosen.sum(0)]
        rows += [sink.square().sum(0), sink.abs().sum(0), sink.sum(0)]
        sums[persona[b]] += torch.stack(rows)
    return sums


def batch(batch_size, tokens, channels, dtype):
    x = torch.randn(batch_size, tokens, channels).mul(3).to(dtype)
    role = torch.randint(0, 2, (batch_size, tokens), dtype=torch.uint8)
    if tokens:
        role[:, 0] = SINK
    return x, role, torch.randint(0, 3, (batch_size,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 9, 17), (1, 1, 1), (5, 33, 64), (0, 4, 3), (3, 7, 129)], ids=str)
def test_against_the_loop(shape, dtype):
    x, role, persona = batch(*shape, dtype)
    sums = torch.zeros(3, len(FIELDS), shape[2], dtype=torch.float64)
    bad = kernels.activation_stats(x, role, persona, sums)
    expected = loop(x, role, persona, 3)
    scale = expected.abs().amax() if expected.numel() else 1
    assert not bad.any()
    assert ((sums - expected).abs() <= 2e-6 * expected.abs() + 1e-7 * scale).all()
    # Squares and magnitudes have no cancellation: the project's bound holds for every channel.
    for row in (FIELDS.index("square"), FIELDS.index("abs")):
        torch.testing.assert_close(sums[:, row], expected[:, row], rtol=2e-6, atol=0)


def test_padding_may_hold_anything():
    x, role, persona = batch(3, 6, 5, torch.float32)
    clean = torch.zeros(3, len(FIELDS), 5, dtype=torch.float64)
    kernels.activation_stats(x, role, persona, clean)
    x[role == IGNORED] = float("nan")
    spoiled = torch.zeros_like(clean)
    assert not kernels.activation_stats(x, role, persona, spoiled).any()
    assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 2], ids=["sink", "counted"])
def test_bad_values_flag_their_sequence(value, place):
    x, role, persona = batch(4, 5, 3, torch.float32)
    role[:, 2] = COUNTED
    x[1, place, 2] = value
    sums = torch.zeros(3, len(FIELDS), 3, dtype=torch.float64)
    assert kernels.activation_stats(x, role, persona, sums).tolist() == [False, True, False, False]


def test_sums_add_up_and_repeat_bit_for_bit():
    x, role, persona = batch(6, 8, 11, torch.float64)
    whole, parts, again = (torch.zeros(3, len(FIELDS), 11, dtype=torch.float64) for _ in range(3))
    kernels.activation_stats(x, role, persona, whole)
    kernels.activation_stats(x, role, persona, again)
    for start in (0, 2):
        stop = start + 2 + start
        kernels.activation_stats(x[start:stop], role[start:stop], persona[start:stop], parts)
    assert torch.equal(whole, again)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_strided_input():
    x, role, persona = batch(4, 7, 6, torch.float32)
    plain, strided = (torch.zeros(3, len(FIELDS), 6, dtype=torch.float64) for _ in range(2))
    kernels.activation_stats(x, role, persona, plain)
    kernels.activation_stats(x.transpose(0, 1).contiguous().transpose(0, 1), role, persona, strided)
    torch.testing.assert_close(plain, strided, rtol=1e-12, atol=0)


def test_bad_arguments():
    x, role, persona = batch(2, 3, 4, torch.float32)
    sums = torch.zeros(3, len(FIELDS), 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="persona must lie in"):
        kernels.activation_stats(x, role, persona + 7, sums)
    with pytest.raises(TypeError, match="sums"):
        kernels.activation_stats(x, role, persona, sums.float())
    with pytest.raises(ValueError, match="role"):
        kernels.activation_stats(x, role[:, :2], persona, sums)


def test_opcheck():
    x, role, persona = batch(2, 3, 4, torch.float32)
    sums = torch.zeros(3, len(FIELDS), 4, dtype=torch.float64)
    torch.library.opcheck(kernels.activation_stats, (x, role, persona, sums))
