"""Mask selection in Triton where a row is streamed instead of held in registers, and at offsets past 32 bits."""

import math

import numpy as np
import pytest
import torch
from test_mask_select import check

from kernels import mask_select
from kernels.ops.mask_select import triton as select
from kernels.ops.mask_select.reference import mask_select_reference


@pytest.fixture
def streamed(monkeypatch):
    """Rows of more than 32 columns are streamed, 64 at a time."""
    monkeypatch.setattr(select, "LONGEST_RESIDENT", 32)
    monkeypatch.setattr(select, "STREAM_BLOCK", 64)


@pytest.mark.parametrize("with_tiebreak", [False, True])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("columns", [33, 129])
def test_streamed_rows(columns, levels, with_tiebreak, streamed):
    scores = torch.randint(levels, (1, columns)).float() - levels // 2
    tiebreak = torch.randint(3, scores.shape).float() - 1 if with_tiebreak else None
    for keep in (0, columns // 2, columns):
        check(scores, keep, tiebreak)


def test_streamed_special_values(streamed):
    scores = torch.tensor([[-math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38] * 9])
    for keep in (0, 20, 40, 63):
        check(scores, keep)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("keep", [0, 129])
def test_streamed_rows_reject_what_has_no_order(bad, keep, streamed):
    weight = torch.ones(2, 129)
    weight[1, 70] = bad
    with pytest.raises(ValueError, match=r"scores\[1, 70\] is"):
        mask_select(weight, torch.ones(129), keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_streamed_products_are_those_of_the_reference(dtype, streamed):
    weight, channel = torch.randn(1, 129).to(dtype), torch.rand(129) * 1e-38
    assert torch.equal(mask_select(weight, channel, 64), mask_select_reference(weight, channel, 64))


def test_row_of_a_real_length():
    weight, channel = torch.randn(1, 9216).half(), torch.rand(9216)
    assert torch.equal(mask_select(weight, channel, 4608), mask_select_reference(weight, channel, 4608))


def test_offsets_past_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**31 + 16
    weight = torch.from_numpy(np.zeros(stride + 64, dtype=np.float16)).as_strided((2, 16), (stride, 1))
    weight[1, 5:9] = 1
    assert mask_select(weight, torch.ones(16), 4).tolist() == [[0b1111, 0], [0b11100000, 1]]
