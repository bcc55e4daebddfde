"""SparseWeight both ways, and the sparse product of every backend and instruction set against float64."""

import math

import pytest
import torch
from oracles import DTYPES, assert_as_accurate, packed, strided
from torch.library import opcheck
from torch.nn import functional as F

from kernels import SparseWeight, sparse_linear
from kernels.ops.sparse_linear import PADDING
from kernels.ops.sparse_linear.cpp import sparse_linear_cpp
from kernels.ops.sparse_linear.reference import sparse_linear_reference

SHAPES = [
    (0, 5, 9),
    (1, 1, 1),
    (3, 6, 8),
    (5, 7, 15),
    (16, 33, 577),
    (2, 13, 1100),
    (17, 37, 65),
    (64, 130, 33),
    (27, 67, 1100),
]
SHAPES += [(3, 0, 9), (3, 5, 0), (50, 67, 1100)]


def problem(MNK, dtype, density=0.5):
    M, N, K = MNK
    mask = torch.rand(N, K) < density
    mask[: N > 0], mask[N - 1 :] = False, N > 1
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), mask, torch.randn(N).to(dtype)


@pytest.mark.parametrize("MNK", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_packing_is_lossless(MNK, dtype):
    _, weight, mask, _ = problem(MNK, dtype)
    if weight.numel():
        weight[-1, :1] = math.nan
        weight[-1, 1:2] = -0.0
    packed_weight = SparseWeight.from_dense(weight, mask)
    assert torch.equal(packed_weight.bits, packed(mask).reshape(packed_weight.bits.shape))
    assert packed_weight.values.numel() == mask.sum() + PADDING
    dense = packed_weight.to_dense()
    assert torch.equal(dense.nan_to_num(9), torch.where(mask, weight, 0).nan_to_num(9))
    assert torch.equal(dense.signbit(), torch.where(mask, weight, 0).signbit())
    assert torch.equal(packed_weight.mask(), mask)


@pytest.mark.parametrize("MNK", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_plain(isa_of_products, MNK, with_bias, dtype):
    x, weight, mask, bias = problem(MNK, dtype)
    bias = bias if with_bias else None
    gated = torch.where(mask, weight, 0)
    y = sparse_linear(x, SparseWeight.from_dense(weight, mask), bias)
    wide = None if bias is None else bias.double()
    assert_as_accurate(y, F.linear(x, gated, bias), F.linear(x.double(), gated.double(), wide))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("rows", [1, 20])
def test_densities(isa_of_products, density, rows):
    x, weight, mask, _ = problem((rows, 9, 700), torch.bfloat16, density)
    y = sparse_linear(x, SparseWeight.from_dense(weight, mask))
    gated = torch.where(mask, weight, 0)
    assert_as_accurate(y, F.linear(x, gated), F.linear(x.double(), gated.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_removed_weights_are_gone(isa_of_products, dtype):
    x, weight, mask, bias = problem((3, 33, 75), dtype)
    spoiled = torch.where(mask, weight, math.nan)
    expected = sparse_linear(x, SparseWeight.from_dense(weight, mask), bias)
    assert torch.equal(sparse_linear(x, SparseWeight.from_dense(spoiled, mask), bias), expected)
    x[1, 3] = math.inf
    gated = torch.where(mask, weight, 0)
    y = sparse_linear(x, SparseWeight.from_dense(weight, mask))
    assert torch.equal(y[1].isnan(), F.linear(x, gated)[1].isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_layout_and_batch_change_no_bit(isa_of_products, threads, dtype):
    x, weight, mask, bias = problem((7, 1031, 129), dtype)
    w = SparseWeight.from_dense(weight, mask)
    expected = sparse_linear(x, w, bias)
    for count in (1, 2, 3, 7):
        threads(count)
        assert torch.equal(sparse_linear(strided(x), w, strided(bias)), expected)
    assert torch.equal(torch.cat([sparse_linear(row[None], w, bias) for row in x]), expected)


@pytest.mark.parametrize("MNK", [(0, 5, 9), (3, 33, 129)], ids=str)
def test_opcheck_and_compile(MNK, compiled):
    x, weight, mask, bias = problem(MNK, torch.float32)
    w = SparseWeight.from_dense(weight, mask)
    opcheck(torch.ops.persona.sparse_linear, (x, w.values, w.bits, w.offsets, bias))
    run = compiled(lambda x: sparse_linear(2 * x, w, bias))
    assert torch.equal(run(x), sparse_linear(2 * x, w, bias))


def test_float64_and_reference():
    x, weight, mask, bias = problem((3, 5, 37), torch.float64)
    w = SparseWeight.from_dense(weight, mask)
    expected = F.linear(x, torch.where(mask, weight, 0), bias)
    for function in (sparse_linear_cpp, sparse_linear_reference):
        torch.testing.assert_close(function(x, w.values, w.bits, w.offsets, bias), expected, rtol=1e-12, atol=1e-12)


def test_input_is_checked():
    x, weight, mask, _ = problem((3, 5, 9), torch.float32)
    w = SparseWeight.from_dense(weight, mask)
    with pytest.raises(ValueError, match=r"mask \[N, K\] must be \[5, 9\]"):
        SparseWeight.from_dense(weight, mask[:4])
    with pytest.raises(TypeError, match="values must be one of float16"):
        sparse_linear(x.half(), w)
    with pytest.raises(ValueError, match=r"bits \[N, ceil\(K/8\)\] must be \['N', 1\]"):
        sparse_linear(x[:, :8], w)
    for bad in (
        (x, w.values[:-1], w.bits, w.offsets, None),
        (x, w.values, w.bits, w.offsets.flip(0), None),
        (x, w.values, w.bits[:, :1], w.offsets, None),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.persona_native.sparse_linear(*bad, torch.empty(3, 5))
