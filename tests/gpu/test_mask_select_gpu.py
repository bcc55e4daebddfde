"""Mask selection on a GPU: the bits of the reference on the CPU, whatever the shape, dtype and backend."""

import math

import pytest
import torch

from kernels import mask_select, mask_select_scores
from kernels.ops.mask_select.reference import mask_select_reference, mask_select_scores_reference

SHAPES = [(576, 576), (192, 576), (576, 1536), (64, 4096), (48, 14336), (8, 28672), (4, 65536), (33, 37), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape, dtype, backend):
    backend("mask_select")
    weight, channel = torch.randn(shape).to(dtype), torch.rand(shape[1])
    for keep in {0, 1, shape[1] // 2, shape[1] * 49 // 50, shape[1]}:
        expected = mask_select_reference(weight, channel, keep)
        assert torch.equal(mask_select(weight.cuda(), channel.cuda(), keep).cpu(), expected)


def test_products_below_the_smallest_normal_number(backend):
    backend("mask_select")
    weight, channel = torch.randn(16, 1536), torch.rand(1536) * 1e-38
    expected = mask_select_reference(weight, channel, 700)
    assert torch.equal(mask_select(weight.cuda(), channel.cuda(), 700).cpu(), expected)


@pytest.mark.parametrize("with_tiebreak", [False, True])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties(shape, levels, with_tiebreak, backend):
    backend("mask_select_scores")
    scores = torch.randint(levels, shape).float() - levels // 2
    scores[torch.rand(shape) < 0.01] = -math.inf
    scores[scores == 0] *= -1
    tiebreak = torch.randint(3, shape).float() if with_tiebreak else None
    on_gpu = None if tiebreak is None else tiebreak.cuda()
    for keep in {0, 1, shape[1] // 2, shape[1]}:
        expected = mask_select_scores_reference(scores, keep, tiebreak)
        assert torch.equal(mask_select_scores(scores.cuda(), keep, on_gpu).cpu(), expected)


@pytest.mark.parametrize("columns", [577, 65536])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_order_is_named(bad, columns, backend):
    backend("mask_select", "mask_select_scores")
    values, fine = torch.randn(3, columns, device="cuda"), torch.randn(3, columns, device="cuda")
    values[1, 6] = values[2, 0] = bad
    with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad} \(2 of"):
        mask_select(values, torch.ones(columns, device="cuda"), 5)
    with pytest.raises(ValueError, match=rf"tiebreak\[1, 6\] is {bad} \(2 of"):
        mask_select_scores(fine, 5, values)


def test_transposed_weight(backend):
    backend("mask_select")
    weight, channel = torch.randn(1536, 576).bfloat16().T, torch.rand(1536)
    expected = mask_select_reference(weight, channel, 768)
    assert torch.equal(mask_select(weight.cuda(), channel.cuda(), 768).cpu(), expected)
