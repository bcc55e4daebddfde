"""Bit packing and mask selection against independent oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels

COLUMNS = (1, 3, 8, 17, 64, 129)


def unpacked(bits, columns):
    """Bit i of byte j is column 8 j + i, spelled out."""
    return [[bool(int(row[c // 8]) >> (c % 8) & 1) for c in range(columns)] for row in bits.tolist()]


def best(scores, keep, tiebreak=None):
    """Columns kept by a plain sort: score, then tiebreak, then the lower column."""
    tiebreak = tiebreak or [[0.0] * len(row) for row in scores]
    rows = []
    for row, ties in zip(scores, tiebreak, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], -ties[c], c))
        rows.append([c in set(order[:keep]) for c in range(len(row))])
    return rows


@pytest.mark.parametrize("columns", COLUMNS)
def test_packing_round_trip(columns):
    mask = torch.rand(2, 5, columns) > 0.5
    bits = kernels.pack_bits(mask)
    assert unpacked(bits[1], columns) == mask[1].tolist()
    assert torch.equal(kernels.unpack_bits(bits, columns), mask)


def test_packing_of_strided_and_empty_masks():
    mask = torch.rand(19, 6) > 0.5
    assert torch.equal(kernels.unpack_bits(kernels.pack_bits(mask.T), 19), mask.T)
    assert kernels.pack_bits(torch.empty(0, 9, dtype=torch.bool)).shape == (0, 2)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_select_keeps_the_best_by_weight_times_score(columns, dtype):
    weight, score = torch.randn(7, columns).to(dtype), torch.rand(columns)
    for keep in sorted({0, 1, columns // 2, columns - 1, columns}):
        bits = kernels.mask_select(weight, score, keep)
        expected = best((weight.float().abs() * score).tolist(), keep)
        assert unpacked(bits, columns) == expected
        assert kernels.unpack_bits(bits, columns).sum(1).tolist() == [keep] * 7


def test_ties_go_to_the_lower_column():
    weight = torch.ones(3, 12)
    weight[1, ::2] = -1
    weight[2] = 0
    bits = kernels.mask_select(weight, torch.ones(12), 5)
    assert unpacked(bits, 12) == [[c < 5 for c in range(12)]] * 3


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_scores_with_tiebreak(data):
    columns, keep = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 20))
    keep = min(keep, columns)
    few = st.lists(st.sampled_from([-float("inf"), -1.0, -0.0, 0.0, 2.0]), min_size=columns, max_size=columns)
    scores, ties = data.draw(few), data.draw(few)
    plain = kernels.mask_select_scores(torch.tensor([scores]), keep)
    assert unpacked(plain, columns) == best([scores], keep)
    broken = kernels.mask_select_scores(torch.tensor([scores]), keep, torch.tensor([ties]))
    assert unpacked(broken, columns) == best([scores], keep, [ties])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unordered_scores_are_refused_with_their_place(bad):
    scores = torch.zeros(3, 4)
    scores[2, 1] = bad
    with pytest.raises(ValueError, match=r"scores\[2, 1\]"):
        kernels.mask_select_scores(scores, 2)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        kernels.mask_select(scores, torch.ones(4), 2)


@pytest.mark.parametrize(
    ("weight", "score", "keep", "error"),
    [
        (torch.ones(2, 3), torch.ones(4), 1, "channel_score"),
        (torch.ones(3), torch.ones(3), 1, "weight"),
        (torch.ones(2, 3), torch.ones(3), 4, "keep must lie in 0..3, got 4"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(3), 1, "weight must be one of"),
    ],
    ids=["score-length", "weight-1d", "keep", "dtype"],
)
def test_bad_arguments_name_themselves(weight, score, keep, error):
    with pytest.raises((ValueError, TypeError), match=error):
        kernels.mask_select(weight, score, keep)


def test_opcheck():
    mask = torch.rand(3, 11) > 0.5
    torch.library.opcheck(kernels.pack_bits, (mask,))
    torch.library.opcheck(kernels.unpack_bits, (kernels.pack_bits(mask), 11))
    torch.library.opcheck(kernels.mask_select, (torch.randn(3, 11), torch.rand(11), 4))
    torch.library.opcheck(kernels.mask_select_scores, (torch.randn(3, 11), 4, torch.randn(3, 11)))


def test_compiles_whole():
    run = torch.compile(
        lambda w, a: kernels.unpack_bits(kernels.mask_select(w, a, 3), 9), fullgraph=True, backend="aot_eager"
    )
    weight, score = torch.randn(4, 9), torch.rand(9)
    assert torch.equal(run(weight, score), kernels.unpack_bits(kernels.mask_select(weight, score, 3), 9))
