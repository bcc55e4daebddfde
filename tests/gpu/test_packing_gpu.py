"""Packing, selection in groups and selection by one threshold on a GPU: the bits of the reference on the CPU."""

import math

import pytest
import torch

from kernels import mask_select_global, mask_select_nm, mask_select_threshold
from kernels.ops.mask_select_global.reference import mask_select_global_reference, mask_select_threshold_reference
from kernels.ops.mask_select_nm.reference import mask_select_nm_reference
from kernels.ops.pack_bits import pack_bits, unpack_bits
from kernels.ops.pack_bits.reference import pack_bits_reference

SHAPES = [(576, 576), (192, 1536), (48, 14336), (4, 65536), (33, 37), (1, 1), (0, 9), (3, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("PERSONA_BACKEND", "triton")


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 129)], ids=str)
def test_packing(shape, triton):
    mask = torch.rand(shape) < 0.5
    bits = pack_bits(mask.cuda())
    assert torch.equal(bits.cpu(), pack_bits_reference(mask))
    assert torch.equal(unpack_bits(bits, shape[-1]).cpu(), mask)
    assert torch.equal(pack_bits(mask.cuda().transpose(0, -1)).cpu(), pack_bits_reference(mask.transpose(0, -1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (0, 4), (8, 8)])
def test_groups(n, m, dtype, triton):
    for rows, columns in ((576, 576), (48, 14336), (5, 8), (0, 8)):
        for levels in (3, min(10**6, int(torch.finfo(dtype).max))):
            weight, channel = torch.randint(-levels, levels, (rows, columns)).to(dtype), torch.rand(columns)
            expected = mask_select_nm_reference(weight, channel, n, m)
            assert torch.equal(mask_select_nm(weight.cuda(), channel.cuda(), n, m).cpu(), expected)


@pytest.mark.parametrize("levels", [2, 1000, 0])
def test_all_matrices_together(levels, triton):
    scores = [torch.randint(levels, s).float() - 1 if levels else torch.randn(s) for s in SHAPES]
    scores[0][scores[0] == 0] *= -1
    total = sum(matrix.numel() for matrix in scores)
    for keep in (0, 1, total // 2, total * 49 // 50, total):
        found = mask_select_global([matrix.cuda() for matrix in scores], keep)
        for one, expected in zip(found, mask_select_global_reference(scores, keep), strict=True):
            assert torch.equal(one.cpu(), expected)


@pytest.mark.parametrize("threshold", [-math.inf, -0.0, 1.0, 1e39, 1e-46])
@pytest.mark.parametrize("ties", [0, 1, 5000, 10**7])
def test_threshold(threshold, ties, triton):
    scores = torch.randint(-2, 3, (129, 4099)).float()
    scores[3, 3] = -math.inf
    expected = mask_select_threshold_reference(scores, threshold, ties)
    assert torch.equal(mask_select_threshold(scores.cuda(), threshold, ties).cpu(), expected)
    expected = mask_select_threshold_reference(scores.T, threshold, ties)
    assert torch.equal(mask_select_threshold(scores.cuda().T, threshold, ties).cpu(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_order_is_named(bad, triton):
    values = torch.randn(3, 1024, device="cuda")
    values[1, 6] = bad
    for select in (
        lambda: mask_select_nm(values, torch.ones(1024, device="cuda"), 2, 4),
        lambda: mask_select_threshold(values, 0.0),
        lambda: mask_select_global([values], 5),
    ):
        with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad}"):
            select()
