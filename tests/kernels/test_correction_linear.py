"""The correction form of every backend and instruction set against the float64 oracle of the masked product."""

import pytest
import torch
from oracles import DTYPES, assert_as_accurate, masked_product_float64, masked_product_plain, packed, strided
from torch.library import opcheck

from kernels import correction_linear, removed_lists
from kernels.ops.correction_linear.cpp import by_panels, correction_linear_cpp
from kernels.ops.correction_linear.reference import correction_linear_reference

# Where everything is removed nothing is left to compare with: the error is that of the dense product.
SHAPES = [(0, 5, 9, 2), (1, 3, 9, 1), (3, 7, 8, 0), (5, 6, 15, 33), (16, 33, 577, 5), (2, 13, 1100, 2), (70, 37, 65, 2)]


def problem(MNKP, dtype, kind="mixed", density=0.95):
    """x, weight, masks, persona, bias; the first row is fully masked, the second fully kept."""
    M, N, K, P = MNKP
    masks = torch.rand(P, N, K) < density
    masks[:, :1], masks[:, 1:2] = False, True
    index = torch.arange(M) % (P + 1) - 1 if kind == "mixed" else torch.tensor([P - 1])
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), masks, index.int(), torch.randn(N).to(dtype)


def call(function, x, weight, masks, persona, gamma, bias):
    return function(x, weight, *removed_lists(packed(masks), weight.shape[1]), persona, gamma, bias)


@pytest.mark.parametrize("MNKP", SHAPES, ids=str)
def test_lists(MNKP):
    _, weight, masks, _, _ = problem(MNKP, torch.float32)
    columns, offsets = removed_lists(packed(masks), weight.shape[1])
    assert (columns.dtype, offsets.dtype) == (torch.uint16, torch.int32)
    for p, mask in enumerate(masks):
        for n, row in enumerate(mask):
            listed = columns[int(offsets[p, n]) : int(offsets[p, n + 1])].int()
            assert listed.tolist() == (~row).nonzero().flatten().tolist()


@pytest.mark.parametrize("function", [correction_linear_cpp, by_panels])
@pytest.mark.parametrize("MNKP", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "one"])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_plain(isa, function, MNKP, kind, gamma, dtype):
    x, weight, masks, persona, bias = problem(MNKP, dtype, kind)
    for b in (bias, None):
        arguments = (x, weight, masks, persona, gamma, b)
        plain = masked_product_plain(*arguments)
        assert_as_accurate(call(function, *arguments), plain, masked_product_float64(*arguments))


@pytest.mark.parametrize("MNKP", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(MNKP, dtype):
    x, weight, masks, persona, bias = problem(MNKP, dtype)
    arguments = (x, weight, masks, persona, 0.3, bias)
    plain, oracle = masked_product_plain(*arguments), masked_product_float64(*arguments)
    assert_as_accurate(call(correction_linear_reference, *arguments), plain, oracle)
    assert_as_accurate(call(correction_linear, *arguments), plain, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_layout(isa, dtype, rows):
    x, weight, masks, persona, bias = problem((rows, 33, 75, 3), dtype)
    lists = removed_lists(packed(masks), 75)
    arguments = (x, weight, masks, persona, 0.0, bias)
    plain, oracle = masked_product_plain(*arguments), masked_product_float64(*arguments)
    y = correction_linear(strided(x), strided(weight), *map(strided, lists), strided(persona), 0.0, strided(bias))
    assert_as_accurate(y, plain, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_batch_change_no_bit(isa, threads, dtype):
    x, weight, masks, persona, bias = problem((7, 1031, 129, 3), dtype)
    lists = removed_lists(packed(masks), 129)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(correction_linear(x, weight, *lists, persona, 0.0, bias))
    assert all(torch.equal(result, results[0]) for result in results)
    alone = [correction_linear(x[m : m + 1], weight, *lists, persona[m : m + 1], 0.0, bias) for m in range(7)]
    assert torch.equal(torch.cat(alone), results[0])


@pytest.mark.parametrize("MNKP", [(0, 5, 9, 2), (7, 33, 129, 5)], ids=str)
def test_opcheck_and_compile(MNKP, compiled):
    x, weight, masks, persona, bias = problem(MNKP, torch.float32)
    lists = removed_lists(packed(masks), weight.shape[1])
    opcheck(torch.ops.persona.correction_linear, (x, weight, *lists, persona, 0.3, bias))
    run = compiled(lambda x: correction_linear(2 * x, weight, *lists, persona, 0.3, bias))
    assert torch.equal(run(x), correction_linear(2 * x, weight, *lists, persona, 0.3, bias))


def test_input_is_checked():
    x, weight, masks, persona, bias = problem((3, 5, 9, 2), torch.float32)
    columns, offsets = removed_lists(packed(masks), 9)
    with pytest.raises(ValueError, match=r"correction_linear: persona must lie in -1..1, got \[2\]"):
        correction_linear(x, weight, columns, offsets, torch.tensor([2], dtype=torch.int32))
    with pytest.raises(TypeError, match="columns must be one of uint16"):
        correction_linear(x, weight, columns.int(), offsets, persona)
    with pytest.raises(ValueError, match=r"offsets \[P, N \+ 1\] must be \['P', 6\]"):
        correction_linear(x, weight, columns, offsets[:, :5], persona)
    with pytest.raises(ValueError, match="columns must lie in 0..65536, got 65537"):
        removed_lists(torch.zeros(1, 1, 8193, dtype=torch.uint8), 65537)
    op, y = torch.ops.persona_native.correction_linear, torch.empty(3, 5)
    for bad in (
        (columns[:1], offsets),
        (columns, offsets.flip(1)),
        (columns.int(), offsets),
        (columns, offsets.long()),
    ):
        with pytest.raises(RuntimeError):
            op(x, weight, *bad, persona, 0.0, bias, y)
    # A column that does not exist reads no memory outside the weight.
    op(x, weight, torch.full_like(columns.int(), 60000).to(torch.uint16), offsets, persona, 0.0, bias, y)
