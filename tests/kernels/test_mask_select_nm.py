"""N:M selection against ``sorted`` on every group, on every backend of this machine."""

import math

import pytest
import torch
from oracles import DTYPES, INTERPRETED, packed, strided
from torch.library import opcheck

from kernels import mask_select_nm, native
from kernels.ops.mask_select_nm.cpp import mask_select_nm_cpp
from kernels.ops.mask_select_nm.reference import mask_select_nm_reference

PATTERNS = [(1, 2), (2, 4), (4, 8), (1, 4), (0, 4), (8, 8), (3, 8)]


def best(scores, n, m):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        for start in range(0, len(values), m):
            group = sorted(range(start, start + m), key=lambda j: (-values[j], j))
            mask[row, group[:n]] = True
    return mask


@pytest.fixture(params=["reference", *INTERPRETED, *native.instruction_sets()])
def select(request):
    if request.param == "reference":
        yield mask_select_nm_reference
        return
    if request.param == "triton":
        from kernels.ops.mask_select_nm.triton import mask_select_nm_triton

        yield mask_select_nm_triton
        return
    before = torch.ops.persona_native.instruction_set()
    native.use_instruction_set(request.param)
    yield mask_select_nm_cpp
    native.use_instruction_set(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_keeps_the_best_of_every_group(select, n, m, dtype):
    for rows, groups in ((1, 1), (3, 7), (5, 16), (0, 3), (2, 0), (2, 73)):
        weight, channel = torch.randint(-3, 4, (rows, groups * m)).to(dtype), torch.rand(groups * m)
        scores = weight.float().abs() * channel
        assert torch.equal(select(weight, channel, n, m), packed(best(scores, n, m)))
        if weight.numel():
            assert torch.equal(select(strided(weight), strided(channel), n, m), packed(best(scores, n, m)))


def test_zeros_of_both_signs_tie(select):
    weight = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 0.0, 1.0, -0.0, 1.0]])
    assert torch.equal(select(weight, torch.ones(8), 2, 4), packed(best(weight.abs(), 2, 4)))
    assert torch.equal(select(weight, -torch.ones(8), 2, 4), packed(best(-weight.abs(), 2, 4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_named(select, bad):
    weight = torch.randn(3, 16)
    weight[1, 6] = weight[2, 0] = bad
    with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad} \(2 of 48"):
        select(weight, torch.ones(16), 2, 4)


def test_input_is_checked():
    with pytest.raises(ValueError, match="m must be one of 2, 4, 8, got 3"):
        mask_select_nm(torch.ones(2, 9), torch.ones(9), 1, 3)
    with pytest.raises(ValueError, match=r"K must be a multiple of m = 4, got \[2, 9\] float32"):
        mask_select_nm(torch.ones(2, 9), torch.ones(9), 1, 4)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.4, got 5"):
        mask_select_nm(torch.ones(2, 8), torch.ones(8), 5, 4)
    with pytest.raises(ValueError, match=r"channel_score \[K\] must be \[8\], got \[9\]"):
        mask_select_nm(torch.ones(2, 8), torch.ones(9), 2, 4)


@pytest.mark.parametrize("shape", [(5, 128), (0, 8), (3, 12)], ids=str)
def test_opcheck(shape):
    opcheck(torch.ops.persona.mask_select_nm, (strided(torch.randn(shape)), torch.rand(shape[1]), 2, 4))


def test_compile(compiled):
    weight, channel = torch.randn(5, 128), torch.rand(128)
    select = compiled(lambda w, a: mask_select_nm(w * 2, a, 2, 4))
    assert torch.equal(select(weight, channel), packed(best((2 * weight).abs() * channel, 2, 4)))
