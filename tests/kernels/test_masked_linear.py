"""The masked product against a float64 loop over rows, its gradients against autograd of the dense formula."""

import pytest
import torch
from oracles import (
    DTYPES,
    assert_as_accurate,
    masked_product_float64,
    masked_product_plain,
    packed,
    random_masks,
    strided,
)
from torch.library import opcheck

from kernels import masked_linear

SHAPES = [(0, 5, 9, 2), (1, 1, 1, 1), (7, 33, 129, 5), (13, 129, 37, 2), (6, 5, 64, 1), (3, 2, 8, 2)]


def grid(*shapes):
    """The test for every shape, kind of ``persona``, gamma, bias or none, and dtype."""

    def apply(test):
        for name, values in {
            "MNKP": shapes,
            "kind": ["mixed", "uniform", "unmasked"],
            "gamma": [0.0, 0.3],
            "with_bias": [False, True],
            "dtype": DTYPES,
        }.items():
            test = pytest.mark.parametrize(name, values, ids=str)(test)
        return test

    return apply


def personas(kind, rows, masks):
    """int32: every persona and -1 in turn, the last persona for all rows, or the plain weight for all rows."""
    if kind == "mixed":
        return (torch.arange(rows) % (masks + 1) - 1).int()
    return torch.tensor([masks - 1 if kind == "uniform" else -1], dtype=torch.int32)


def problem(MNKP, kind, gamma, with_bias, dtype):
    """x, weight, bool masks, persona, gamma, bias: the arguments of the oracles."""
    M, N, K, P = MNKP
    x, weight, bias = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    return x, weight, random_masks(P, N, K), personas(kind, M, P), gamma, bias if with_bias else None


def call(x, weight, masks, persona, gamma, bias):
    return masked_linear(x, weight, packed(masks), persona, gamma, bias)


def gradients(function, grad, x, weight, masks, persona, gamma, bias):
    """Gradients of x, weight and (where given) bias."""
    x, weight, bias = (None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, masks, persona, gamma, bias)
    return torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None], grad.to(y.dtype))


@grid(*SHAPES)
def test_forward(MNKP, kind, gamma, with_bias, dtype):
    arguments = problem(MNKP, kind, gamma, with_bias, dtype)
    assert_as_accurate(call(*arguments), masked_product_plain(*arguments), masked_product_float64(*arguments))


@grid(*SHAPES[:3])
def test_gradients(MNKP, kind, gamma, with_bias, dtype):
    x, weight, masks, persona, gamma, bias = arguments = problem(MNKP, kind, gamma, with_bias, dtype)
    grad = torch.randn(MNKP[:2]).to(dtype)
    wide = (x.double(), weight.double(), masks, persona, gamma, None if bias is None else bias.double())
    actual = gradients(call, grad, *arguments)
    plain = gradients(masked_product_plain, grad, *arguments)
    oracle = gradients(masked_product_plain, grad, *wide)
    for triple in zip(actual, plain, oracle, strict=True):
        assert_as_accurate(*triple)


@pytest.mark.parametrize("kind", ["mixed", "uniform", "unmasked"])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_gradcheck(kind, gamma):
    x, weight, masks, persona, gamma, bias = problem((5, 3, 9, 2), kind, gamma, True, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.autograd.gradcheck(lambda x, weight, bias: call(x, weight, masks, persona, gamma, bias), leaves)
    expanded = torch.autograd.grad(call(*leaves[:2], masks, persona, gamma, leaves[2]).sum(), leaves)
    oracle = torch.autograd.grad(masked_product_plain(*leaves[:2], masks, persona, gamma, leaves[2]).sum(), leaves)
    torch.testing.assert_close(expanded, oracle, rtol=1e-12, atol=1e-12)


def test_only_the_gradient_that_is_asked_for():
    x, weight, masks, persona, gamma, _ = problem((5, 3, 9, 2), "mixed", 0.0, False, torch.float64)
    call(x.requires_grad_(), weight, masks, persona, gamma, None).sum().backward()
    assert weight.grad is None
    gates = torch.cat([torch.ones(1, 3, 9), masks.double()])[persona.long() + 1]
    torch.testing.assert_close(x.grad, (gates * weight).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype):
    x, weight, masks, persona, gamma, bias = arguments = problem((7, 33, 37, 5), "mixed", 0.3, True, dtype)
    plain, oracle = masked_product_plain(*arguments), masked_product_float64(*arguments)
    views = [strided(t) for t in (x, weight, packed(masks), persona)]
    assert_as_accurate(masked_linear(*views, gamma, strided(bias)), plain, oracle)
    transposed = weight.T.contiguous().T
    assert_as_accurate(call(x, transposed, masks, persona, gamma, bias), plain, oracle)
    row = x[:1].expand(7, -1)
    once = (row.contiguous(), *arguments[1:])
    assert_as_accurate(call(row, *arguments[1:]), masked_product_plain(*once), masked_product_float64(*once))


def test_fully_masked_row_leaves_the_bias_and_ignores_the_weight():
    x, weight, masks, persona, _, bias = problem((7, 33, 129, 5), "mixed", 0.0, True, torch.float32)
    persona = persona.clamp(min=0)
    y = call(x, weight, masks, persona, 0.0, bias)
    assert torch.equal(y[:, 0], bias[:1].expand(7))
    other = torch.where(masks.any(0), weight, weight + 100)
    assert torch.equal(call(x, other, masks, persona, 0.0, bias), y)


def test_rows_do_not_touch_each_other():
    x, weight, masks, persona, gamma, _ = problem((7, 33, 129, 5), "mixed", 0.3, False, torch.float32)
    before = call(x, weight, masks, persona, gamma, None)
    spoiled = x.clone()
    spoiled[3] = torch.nan
    after = call(spoiled, weight, masks, persona, gamma, None)
    assert after[3].isnan().all()
    assert torch.equal(after[persona != persona[3]], before[persona != persona[3]])


def test_unused_bits_are_ignored():
    x, weight, masks, persona, gamma, _ = problem((7, 5, 37, 2), "mixed", 0.0, False, torch.float32)
    dirty = packed(masks)
    dirty[..., -1] |= 0b11100000
    assert torch.equal(masked_linear(x, weight, dirty, persona), call(x, weight, masks, persona, gamma, None))


BAD = {
    "persona past the masks": ({"persona": torch.tensor([2], dtype=torch.int32)}, ValueError, r"-1\.\.1, got \[2\]"),
    "persona -2": ({"persona": torch.tensor([-2], dtype=torch.int32)}, ValueError, r"-1\.\.1, got \[-2\]"),
    "persona int64": ({"persona": torch.tensor([0])}, TypeError, "persona must be one of int32"),
    "persona length": ({"persona": torch.zeros(3, dtype=torch.int32)}, ValueError, r"persona \[M\] must be \[4\]"),
    "gamma 1": ({"gamma": 1.0}, ValueError, "0 <= gamma < 1, got 1.0"),
    "gamma negative": ({"gamma": -0.1}, ValueError, "0 <= gamma < 1, got -0.1"),
    "gamma nan": ({"gamma": float("nan")}, ValueError, "0 <= gamma < 1, got nan"),
    "weight dtype": ({"weight": torch.ones(5, 9).half()}, TypeError, "weight must be one of float32, got .*float16"),
    "weight shape": ({"weight": torch.ones(9, 5)}, ValueError, r"weight \[N, K\] must be \['N', 9\], got \[9, 5\]"),
    "bits shape": ({"bits": torch.zeros(2, 5, 1, dtype=torch.uint8)}, ValueError, r"must be \['P', 5, 2\]"),
    "bias shape": ({"bias": torch.ones(9)}, ValueError, r"bias \[N\] must be \[5\], got \[9\]"),
    "x 3-d": ({"x": torch.ones(1, 4, 9)}, ValueError, r"x \[M, K\] must be"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_input_is_checked(change, error, message):
    good = {
        "x": torch.ones(4, 9),
        "weight": torch.ones(5, 9),
        "bits": torch.zeros(2, 5, 2, dtype=torch.uint8),
        "persona": torch.tensor([0], dtype=torch.int32),
    }
    masked_linear(**good)
    with pytest.raises(error, match=message):
        masked_linear(**(good | change))


@pytest.mark.parametrize(("MNKP", "kind"), [((0, 5, 9, 2), "uniform"), ((7, 33, 129, 5), "mixed")], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "transposed"])
def test_opcheck(MNKP, kind, order):
    x, weight, masks, persona, gamma, bias = problem(MNKP, kind, 0.3, True, torch.float32)
    if order == "transposed":
        weight = weight.T.contiguous().T
    opcheck(torch.ops.persona.masked_linear, (x, weight, packed(masks), persona, gamma))
    grad = torch.randn(MNKP[:2])
    opcheck(torch.ops.persona.masked_linear_backward, (grad, x, weight, packed(masks), persona, gamma))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    opcheck(torch.ops.persona.masked_linear, (*leaves[:2], packed(masks), persona, gamma, leaves[2]))


@pytest.mark.parametrize("kind", ["mixed", "uniform"])
def test_compile_with_gradients(kind, compiled):
    x, weight, masks, persona, gamma, bias = arguments = problem((7, 33, 129, 5), kind, 0.3, True, torch.float64)
    bits, grad = packed(masks), torch.randn(7, 33, dtype=torch.float64)
    function = compiled(lambda x, w, b: masked_linear(2 * x, w, bits, persona, gamma, b))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    doubled = (2 * x, *arguments[1:])
    torch.testing.assert_close(y, masked_product_float64(*doubled), rtol=1e-12, atol=1e-12)
    oracle = gradients(masked_product_plain, grad, *doubled)
    actual = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(actual, (2 * oracle[0], *oracle[1:]), rtol=1e-12, atol=1e-12)
