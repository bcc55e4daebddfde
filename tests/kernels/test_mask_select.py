"""Mask selection against Python's ``sorted`` on every row."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, strided, unpacked
from torch.library import opcheck

from kernels import mask_select, mask_select_scores

SHAPES = [(1, 1), (3, 8), (5, 129), (4, 37), (1, 64), (0, 9), (7, 1), (2, 33)]


def keeps(columns):
    return sorted({0, 1, columns // 2, columns - 1, columns})


def best(scores, keep, tiebreak=None):
    """The ``keep`` best columns of every row, by score, then tiebreak, then lower column."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    second = torch.zeros_like(scores) if tiebreak is None else tiebreak
    for row, (s, t) in enumerate(zip(scores.tolist(), second.tolist(), strict=True)):
        ranked = sorted(range(len(s)), key=lambda j: (-s[j], -t[j], j))
        mask[row, ranked[:keep]] = True
    return mask


def check(scores, keep, tiebreak=None):
    selected = mask_select_scores(scores, keep, tiebreak)
    # Unused bits of the last byte would count as kept weights somewhere: read them too.
    everything = unpacked(selected, 8 * selected.shape[1])
    assert everything.sum(1).tolist() == [keep] * len(scores)
    assert torch.equal(everything[:, : scores.shape[1]], best(scores, keep, tiebreak))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeps_the_largest_products(shape, dtype):
    weight, channel = torch.randn(shape).to(dtype), torch.rand(shape[1])
    scores = np.abs(weight.float().numpy()) * channel.numpy()
    for keep in keeps(shape[1]):
        selected = unpacked(mask_select(weight, channel, keep), shape[1])
        assert torch.equal(selected, best(torch.from_numpy(scores), keep))


def test_low_precision_weights_are_ranked_by_the_float32_product():
    # In bfloat16 all three products round to 1: only float32 sees that the middle one is the largest.
    weight, channel = torch.ones(1, 3, dtype=torch.bfloat16), torch.tensor([1.0, 1.001, 0.999])
    assert unpacked(mask_select(weight, channel, 1), 3).tolist() == [[False, True, False]]


@pytest.mark.parametrize("with_tiebreak", [False, True])
@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_with_ties(shape, levels, with_tiebreak):
    scores = torch.randint(levels, shape).float() - levels // 2
    tiebreak = torch.randint(3, shape).float() - 1 if with_tiebreak else None
    for keep in keeps(shape[1]):
        check(scores, keep, tiebreak)


ROWS = {
    "zeros": [0.0] * 37,
    "signed zeros": [-0.0, 0.0] * 18 + [-0.0],
    "constant": [-3.5] * 37,
    "minus infinity": [-math.inf] * 37,
    "some minus infinity": [-math.inf, 1.0, -math.inf, 1.0, -2.0] * 7 + [-math.inf, 0.0],
    "neighbours": [float(np.nextafter(np.float32(1), np.float32(2))), 1.0] * 18 + [1.0],
    "subnormal": [1e-45, 0.0, -1e-45] * 12 + [0.0],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("tiebreak", ["none", "zeros", "same", "random"])
def test_equal_scores_go_to_the_lower_column(row, tiebreak):
    scores = torch.tensor([row, row[::-1]])
    second = {"none": None, "zeros": ROWS["signed zeros"], "same": row}.get(tiebreak)
    if second is not None:
        second = torch.tensor([second, second])
    elif tiebreak == "random":
        second = torch.randint(2, scores.shape).float()
    for keep in keeps(len(row)):
        check(scores, keep, second)


def test_zero_weights_tie_whatever_their_sign():
    weight, channel = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 1.0]]), torch.ones(5)
    assert unpacked(mask_select(weight, channel, 3), 5).tolist() == [[True, True, False, False, True]]


FEW_VALUES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-45, 2.0, 3e38])


@settings(deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 40), st.booleans())
def test_any_row(data, columns, with_tiebreak):
    row = st.lists(FEW_VALUES | st.floats(-(2.0**100), 2.0**100, width=32), min_size=columns, max_size=columns)
    scores = torch.tensor([data.draw(row), data.draw(row)])
    tiebreak = torch.tensor([data.draw(row), data.draw(row)]) if with_tiebreak else None
    check(scores, data.draw(st.integers(0, columns)), tiebreak)


@settings(deadline=None, derandomize=True)
@given(st.lists(FEW_VALUES, min_size=1, max_size=40))
def test_larger_keep_contains_smaller(row):
    scores = torch.tensor([row])
    masks = [unpacked(mask_select_scores(scores, keep), len(row)) for keep in range(len(row) + 1)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keep", [0, 2, 9])
def test_nan_and_infinity_are_named(bad, keep):
    values, fine = torch.randn(3, 9), torch.randn(3, 9)
    values[1, 6] = values[2, 0] = bad
    with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad} \(2 of 27"):
        mask_select_scores(values, keep)
    with pytest.raises(ValueError, match=rf"tiebreak\[1, 6\] is {bad} \(2 of 27"):
        mask_select_scores(fine, keep, values)
    with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad} \(2 of 27"):
        mask_select(values, torch.ones(9), keep)


def test_infinite_channel_times_zero_weight_is_rejected():
    with pytest.raises(ValueError, match=r"\[0, 2\] is nan"):
        mask_select(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1.0, 1.0, math.inf]), 1)


def test_non_contiguous():
    weight, channel, tiebreak = torch.randn(6, 37), torch.rand(37), torch.randn(6, 37)
    scores = torch.randint(3, (6, 37)).float()
    assert torch.equal(mask_select(strided(weight), strided(channel), 11), mask_select(weight, channel, 11))
    check(strided(scores), 11, strided(tiebreak))
    check(scores[:1].expand(4, -1), 11)
    check(strided(scores), 11)


def test_input_is_checked():
    with pytest.raises(ValueError, match=r"keep must lie in 0\.\.9, got 10"):
        mask_select_scores(torch.ones(2, 9), 10)
    with pytest.raises(ValueError, match=r"keep must lie in 0\.\.9, got -1"):
        mask_select(torch.ones(2, 9), torch.ones(9), -1)
    with pytest.raises(ValueError, match=r"channel_score \[K\] must be \[9\], got \[8\]"):
        mask_select(torch.ones(2, 9), torch.ones(8), 1)
    with pytest.raises(ValueError, match=r"tiebreak \[N, K\] must be \[2, 9\], got \[9, 2\]"):
        mask_select_scores(torch.ones(2, 9), 1, torch.ones(9, 2))
    with pytest.raises(TypeError, match="scores must be one of float32, got .* bfloat16"):
        mask_select_scores(torch.ones(2, 9, dtype=torch.bfloat16), 1)


@pytest.mark.parametrize("shape", [(5, 129), (16, 8), (0, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("view", [torch.clone, strided])
def test_opcheck(shape, view):
    values, channel = view(torch.randn(shape)), torch.rand(shape[1])
    opcheck(torch.ops.persona.mask_select, (values.bfloat16(), channel, shape[1] // 2))
    opcheck(torch.ops.persona.mask_select_scores, (values, 1))
    opcheck(torch.ops.persona.mask_select_scores, (values, 1, view(torch.randn(shape))))


def test_compile(compiled):
    weight, channel = torch.randn(5, 129), torch.rand(129)
    select = compiled(lambda w, a: mask_select(w * 2, a, 40))
    assert torch.equal(unpacked(select(weight, channel), 129), best(weight.abs() * channel, 40))
    select = compiled(lambda s, t: mask_select_scores(s.round(), 40, t))
    assert torch.equal(
        unpacked(select(weight, channel.expand(5, -1)), 129), best(weight.round(), 40, channel.expand(5, -1))
    )
