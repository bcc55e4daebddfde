"""What the contract's tests do not see of the Triton statistics: splits, launches, offsets, absent personas."""

import math

import numpy as np
import pytest
import torch
from test_activation_stats import assert_close, batch_of, oracle, zero_sums

from kernels import activation_stats
from kernels.ops.activation_stats import SINK
from kernels.ops.activation_stats import triton as stats


@pytest.mark.parametrize("tokens", [256, 257, pytest.param(520, marks=pytest.mark.slow)])
def test_borders_of_splits(tokens):
    x, role, persona = batch_of((2, tokens, 5), torch.float16)
    # Sinks where a split begins and ends, and in the last split of one sequence alone.
    role[:, [0, 254]], role[1, -1] = SINK, SINK
    x = x.nan_to_num(1)
    sums = zero_sums(5)
    assert not activation_stats(x, role, persona, sums).any()
    assert_close(sums, oracle(x, role, persona), 2e-6)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16], ids=str)
def test_launch_does_not_show_in_the_bits(dtype, monkeypatch):
    x, role, persona = batch_of((1, 260, 37), dtype)
    wide, narrow = zero_sums(37, personas=2), zero_sums(37, personas=2)
    persona %= 2
    activation_stats(x, role, persona, wide)
    monkeypatch.setattr(stats, "split_block", lambda dtype: 32)
    monkeypatch.setattr(stats, "FOLD_BLOCK", 32)
    activation_stats(x, role, persona, narrow)
    assert torch.equal(wide, narrow)


def test_a_sequence_has_the_same_bits_in_every_batch():
    x, role, _ = batch_of((3, 40, 5))
    together, alone = zero_sums(5, personas=3), zero_sums(5, personas=3)
    activation_stats(x, role, torch.arange(3), together)
    for b in range(3):
        activation_stats(x[b : b + 1], role[b : b + 1], torch.tensor([b]), alone)
    assert torch.equal(together, alone)


def test_spans_over_several_splits_have_the_bits_of_rows():
    x, role, _ = batch_of((2, 530, 5), torch.float16)
    spans = [[0, 3, 520], [1, 0, 256], [1, 256, 530], [0, 0, 2]]
    together, apart = zero_sums(5), zero_sums(5)
    spoiled = activation_stats(x, role, torch.arange(4), together, torch.tensor(spans))
    assert not spoiled.any()
    for s, (row, first, last) in enumerate(spans):
        own = slice(row, row + 1), slice(first, last)
        activation_stats(x[own], role[own], torch.tensor([s]), apart)
    assert torch.equal(together, apart)


def test_more_sequences_than_lanes_of_one_persona():
    x, role, _ = batch_of((19, 3, 5), torch.float64)
    persona = torch.full((19,), 1)
    sums = zero_sums(5, personas=2)
    activation_stats(x, role, persona, sums)
    assert_close(sums, oracle(x, role, persona, personas=2), 1e-12)


def test_offsets_past_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False
    stride = 2**31 + 16
    # Pages that nobody writes take no memory.
    x = torch.from_numpy(np.zeros(stride + 2**20, dtype=np.float16)).as_strided((2, 3, 8), (stride, 8, 1))
    x[1] = torch.arange(24).view(3, 8)
    role, persona = torch.ones(2, 3, dtype=torch.uint8), torch.tensor([0, 1])
    sums = zero_sums(8, personas=2)
    activation_stats(x, role, persona, sums)
    assert_close(sums, oracle(x, role, persona, personas=2), 2e-6)


@pytest.mark.parametrize("absent", [-1, 5, 2**40])
def test_absent_persona_is_flagged_and_added_nowhere(absent):
    # As on a GPU, where nobody waits for the values to check them.
    x, role, _ = batch_of((3, 7, 5), torch.float64)
    sums = zero_sums(5)
    assert stats.activation_stats_triton(x, role, torch.tensor([0, absent, 3]), sums).tolist() == [False, True, False]
    keep = torch.tensor([0, 2])
    assert_close(sums, oracle(x[keep], role[keep], torch.tensor([0, 3])), 1e-12)


def test_sums_beyond_float32_are_flagged():
    x, role = torch.full((1, 600, 1), 1.3e18), torch.ones(1, 600, dtype=torch.uint8)
    persona = torch.tensor([0])
    assert not activation_stats(x[:, :200], role[:, :200], persona, zero_sums(1)).any()
    sums = zero_sums(1)
    assert activation_stats(x, role, persona, sums).all()
    assert math.isinf(sums[0, 2, 0])
