"""Mask selection and bit packing in C++: the same bits as the reference, for every instruction set."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import DTYPES, strided

from kernels.ops.mask_select.cpp import mask_select_cpp, mask_select_scores_cpp
from kernels.ops.mask_select.reference import mask_select_reference, mask_select_scores_reference
from kernels.ops.pack_bits.cpp import pack_bits_cpp, unpack_bits_cpp
from kernels.ops.pack_bits.reference import pack_bits_reference, unpack_bits_reference

SHAPES = [(1, 1), (3, 7), (5, 63), (4, 64), (9, 65), (33, 577), (3, 1536), (1, 65536), (0, 9), (4, 0)]
ADVERSARIAL = {
    "zeros": lambda *s: torch.zeros(s),
    "signed zeros": lambda *s: torch.randn(s) * 0.0,
    "few values": lambda *s: torch.randint(-2, 3, s).float(),
    "subnormal": lambda *s: torch.randint(-4, 5, s).float() * 1e-45,
    "neighbours": lambda *s: torch.ones(s) + torch.randint(0, 3, s).float() * 2.0**-23,
    "minus infinity": lambda *s: torch.where(torch.rand(s) < 0.7, -math.inf, torch.randn(s)),
    "all scales": lambda *s: torch.randn(s) * 10.0 ** torch.randint(-37, 37, s),
    "one outlier": lambda *s: torch.randn(s).index_fill(1, torch.tensor([0]), -3e38) if s[1] else torch.zeros(s),
    "rows far apart": lambda *s: torch.randn(s) * 10.0 ** torch.randint(-30, 30, (s[0], 1)),
    "negative": lambda *s: -torch.rand(s),
}


def keeps(columns):
    return sorted({0, min(1, columns), columns // 3, columns // 2, max(columns - 1, 0), columns})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(isa, shape, dtype):
    weight, channel = torch.randn(shape).to(dtype), torch.rand(shape[1])
    for view in (weight, strided(weight)) if weight.numel() else (weight,):
        for keep in keeps(shape[1]):
            assert torch.equal(mask_select_cpp(view, channel, keep), mask_select_reference(weight, channel, keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_a_weight(isa, dtype):
    """Low precision is converted exactly: subnormals, both zeros, the largest values."""
    patterns = torch.arange(2**16).to(torch.uint16).view(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    weight = patterns[patterns.isfinite()].to(dtype).view(64, -1)[:, torch.randperm(patterns.isfinite().sum() // 64)]
    channel = torch.rand(weight.shape[1]) * 1e-3
    expected = mask_select_reference(weight, channel, weight.shape[1] // 2)
    assert torch.equal(mask_select_cpp(weight, channel, weight.shape[1] // 2), expected)


@pytest.mark.parametrize("second", [None, *ADVERSARIAL])
@pytest.mark.parametrize("first", ADVERSARIAL)
def test_scores(isa, first, second):
    for shape in ((6, 65), (3, 577)):
        scores = ADVERSARIAL[first](*shape)
        tiebreak = None if second is None else ADVERSARIAL[second](*shape)
        for keep in keeps(shape[1]):
            expected = mask_select_scores_reference(scores, keep, tiebreak)
            assert torch.equal(mask_select_scores_cpp(scores, keep, tiebreak), expected)
            assert torch.equal(mask_select_scores_cpp(strided(scores), keep, tiebreak), expected)


def test_negative_channels(isa):
    weight, channel = torch.randn(5, 77).bfloat16(), torch.randn(77)
    assert torch.equal(mask_select_cpp(weight, channel, 30), mask_select_reference(weight, channel, 30))


def test_threads_and_runs_change_no_bit(isa, threads):
    weight, channel = torch.randn(257, 577), torch.rand(577)
    results = []
    for count in (1, 2, 3, 7, 1):
        threads(count)
        results.append(mask_select_cpp(weight, channel, 288))
    assert all(torch.equal(result, results[0]) for result in results)


VALUES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-45, -1e-45, 2.0, 3e38])


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 70), st.booleans())
def test_any_rows(isa, data, columns, with_tiebreak):
    row = st.lists(VALUES | st.floats(-(2.0**100), 2.0**100, width=32), min_size=columns, max_size=columns)
    scores = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    tiebreak = torch.tensor([data.draw(row)]).expand(len(scores), -1) if with_tiebreak else None
    keep = data.draw(st.integers(0, columns))
    expected = mask_select_scores_reference(scores, keep, tiebreak)
    assert torch.equal(mask_select_scores_cpp(scores, keep, tiebreak), expected)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 63, 64, 576])
@pytest.mark.parametrize("row", [0, 40])
def test_unordered_scores_are_named_as_by_the_reference(isa, threads, bad, column, row):
    threads(3)
    values, fine = torch.randn(64, 577), torch.randn(64, 577)
    values[row, column] = values[63, 5] = math.copysign(math.nan, bad) if math.isnan(bad) else bad
    for keep in (0, 100, 577):
        for native, reference, arguments in (
            (mask_select_scores_cpp, mask_select_scores_reference, (values, keep, None)),
            (mask_select_scores_cpp, mask_select_scores_reference, (fine, keep, values)),
            (mask_select_cpp, mask_select_reference, (values, torch.ones(577), keep)),
        ):
            with pytest.raises(ValueError, match="are NaN or infinite") as expected:
                reference(*arguments)
            with pytest.raises(ValueError, match="are NaN or infinite") as raised:
                native(*arguments)
            assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(1,), (0,), (3, 0), (3, 7), (2, 3, 65), (0, 9), (5, 64), (2, 0, 3)], ids=str)
def test_packing(shape):
    mask = torch.rand(shape) > 0.5
    bits = pack_bits_cpp(mask)
    assert torch.equal(bits, pack_bits_reference(mask))
    turned = mask.transpose(0, -1)
    assert torch.equal(pack_bits_cpp(turned), pack_bits_reference(turned))
    assert torch.equal(unpack_bits_cpp(bits, shape[-1]), mask)
    assert torch.equal(unpack_bits_reference(bits, shape[-1]), mask)


def test_direct_calls_are_checked():
    ops, scores = torch.ops.persona_native, torch.randn(3, 9)
    bits = torch.zeros(3, 2, dtype=torch.uint8)
    for call in (
        lambda: ops.mask_select(scores, None, None, 10, bits),
        lambda: ops.mask_select(scores, torch.ones(8), None, 3, bits),
        lambda: ops.mask_select(scores, None, scores[:2], 3, bits),
        lambda: ops.mask_select(scores, None, None, 3, bits[:, :1]),
        lambda: ops.mask_select(scores.int(), None, None, 3, bits),
        lambda: ops.mask_select_nm(scores, torch.ones(9), 2, 4, bits),
        lambda: ops.count_digits(scores, 3, 0, torch.zeros(2048, dtype=torch.int64)),
        lambda: ops.pack_bits(scores > 0, bits[:2]),
        lambda: ops.unpack_bits(bits, 9, torch.zeros(3, 8, dtype=torch.bool)),
    ):
        with pytest.raises(RuntimeError):
            call()
