"""MaskedLinear and PersonaSelector: every mode against the float64 oracle, and what happens when one switches."""

import copy

import pytest
import torch
from oracles import (
    DTYPES,
    assert_as_accurate,
    masked_product_float64,
    masked_product_plain,
    packed,
    random_masks,
)
from torch import nn
from torch.nn import functional as F

from kernels import MaskedLinear, PersonaSelector, native

N, K, P = 33, 37, 3
MODES = {"off": None, "uniform": 1, "materialized": 1, "rows": [0, -1, 2]}
"""What is chosen in each mode; a batch has three sequences."""
CHOICES = pytest.mark.parametrize("mode", MODES)
STORED = pytest.mark.parametrize("stored", ["linear", "conv1d", "no-bias"])


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored ``[K, N]``."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, rows)), nn.Parameter(torch.randn(rows))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def original_of(stored, dtype=torch.float32):
    return (Conv1D(N, K) if stored == "conv1d" else nn.Linear(K, N, bias=stored == "linear")).to(dtype)


def layer_of(original, masks=None, **options):
    return MaskedLinear.from_linear(original, random_masks(P, N, K) if masks is None else masks, **options)


def choose(layer, mode, gamma=0.0):
    layer.select(MODES[mode], gamma)
    layer.materialize(mode == "materialized")
    return layer


def expected(layer, masks, mode, gamma, x):
    """Plain PyTorch in the layer's dtype, and the oracle, for ``x [3, T, K]``."""
    choice = MODES[mode] if isinstance(MODES[mode], list) else [-1 if MODES[mode] is None else MODES[mode]] * 3
    rows = torch.tensor([p for p in choice for _ in range(x.shape[1])], dtype=torch.int32)
    arguments = (x.reshape(-1, K), layer.matrix.detach(), masks, rows, gamma, layer.bias)
    with torch.no_grad():
        return [f(*arguments).reshape(*x.shape[:-1], N) for f in (masked_product_plain, masked_product_float64)]


@CHOICES
@STORED
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(mode, stored, gamma, dtype):
    masks = random_masks(P, N, K)
    layer = choose(layer_of(original_of(stored, dtype), masks), mode, gamma)
    for tokens in (0, 1, 5):
        x = torch.randn(3, tokens, K).to(dtype)
        assert_as_accurate(layer(x).detach(), *expected(layer, masks, mode, gamma, x))
        turned = torch.randn(K, tokens, 3).to(dtype).permute(2, 1, 0)
        assert_as_accurate(layer(turned).detach(), *expected(layer, masks, mode, gamma, turned))


@STORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 7, K), (0, 7, K)], ids=str)
@pytest.mark.parametrize("choice", [None, -1], ids=str)
def test_off_is_the_original_bit_for_bit(stored, dtype, shape, choice):
    original = original_of(stored, dtype)
    layer, x = layer_of(original), torch.randn(shape).to(dtype)
    layer.select(1)
    layer.materialize(True)
    layer.select(choice)
    if stored == "conv1d":
        reference = torch.addmm(original.bias, x.reshape(-1, K), original.weight).reshape(*shape[:-1], N)
    else:
        reference = F.linear(x, original.weight, original.bias)
    assert torch.equal(layer(x), reference)


@STORED
def test_parameters_are_shared_and_the_masks_kept(stored):
    original, masks = original_of(stored), random_masks(P, N, K)
    layer = layer_of(original, masks)
    assert layer.weight is original.weight
    assert layer.bias is original.bias
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][: 1 + (layer.bias is not None)]
    assert layer.matrix.data_ptr() == original.weight.data_ptr()
    assert torch.equal(layer.bits, packed(masks))
    assert torch.equal(torch.stack([layer.mask(p) for p in range(P)]), masks)


def test_without_masks():
    original, x = original_of("linear"), torch.randn(2, K)
    layer = MaskedLinear.from_linear(original)
    assert torch.equal(layer(x), original(x))
    layer.select([-1, -1])
    torch.testing.assert_close(layer(x), original(x))
    with pytest.raises(IndexError, match="persona 0 is not among the 0 masks"):
        layer.select(0)


@pytest.mark.parametrize("mode", ["off", "uniform", "rows"])
def test_gradients_reach_the_shared_weight(mode):
    original, masks = original_of("linear", torch.float64), random_masks(P, N, K)
    layer, x = choose(layer_of(original, masks), mode, 0.3), torch.randn(3, 2, K, dtype=torch.float64)
    layer(x).square().sum().backward()
    gradient, bias_gradient = original.weight.grad.clone(), original.bias.grad.clone()
    original.zero_grad()
    choice = {"off": [-1] * 3, "uniform": [1] * 3, "rows": MODES["rows"]}[mode]
    rows = torch.tensor(choice, dtype=torch.int32).repeat_interleave(2)
    masked_product_plain(x.reshape(-1, K), original.weight, masks, rows, 0.3, original.bias).square().sum().backward()
    torch.testing.assert_close(gradient, original.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias_gradient, original.bias.grad, rtol=1e-12, atol=1e-12)


@CHOICES
@STORED
def test_compile(mode, stored, compiled):
    masks = random_masks(P, N, K)
    layer = layer_of(original_of(stored), masks)
    run = compiled(layer)
    x = torch.randn(3, 5, K)
    for gamma in (0.0, 0.3):
        choose(layer, mode, gamma)
        assert_as_accurate(run(x).detach(), *expected(layer, masks, mode, gamma, x))


@pytest.mark.parametrize("choices", [[0, 1, 2], [[0, 1, 2], [2, -1, -1]]], ids=["uniform", "rows"])
@pytest.mark.parametrize("materialize", [False, True])
def test_compiled_layer_follows_the_switch_without_recompiling(choices, materialize, compiled):
    layer, x = layer_of(original_of("linear")), torch.randn(3, 5, K)
    run = compiled(layer)
    for stance, chosen in [("default", choices[:1]), ("fail_on_recompile", choices[1:] + choices)]:
        with torch.compiler.set_stance(stance):
            for choice in chosen:
                layer.selector.select(choice)
                layer.materialize(materialize)
                assert torch.equal(run(x), layer(x))


@CHOICES
def test_deepcopy_is_independent(mode):
    layer, x = choose(layer_of(original_of("linear")), mode, 0.3), torch.randn(3, K)
    before = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.weight.zero_()
    other.select(2)
    assert torch.equal(layer(x), before)
    assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_copy_of_a_materialized_layer_follows_its_own_choice():
    masks, x = random_masks(P, N, K), torch.randn(3, 1, K)
    layer = choose(layer_of(original_of("linear"), masks), "materialized")
    other = copy.deepcopy(layer)
    other.select([0, -1, 2])
    assert_as_accurate(other(x).detach(), *expected(other, masks, "rows", 0.0, x))
    assert layer.fresh


@CHOICES
def test_state_dict_round_trip(mode):
    layer = choose(layer_of(original_of("linear")), mode)
    other = layer_of(original_of("linear"))
    state = layer.state_dict()
    assert sorted(state) == ["bias", "bits", "weight"]
    other.load_state_dict(state)
    x = torch.randn(3, 2, K)
    assert torch.equal(choose(other, mode)(x), layer(x))


@CHOICES
@STORED
def test_to_bfloat16(mode, stored):
    masks = random_masks(P, N, K)
    layer = choose(layer_of(original_of(stored), masks), mode, 0.3).to(torch.bfloat16)
    assert torch.equal(layer.bits, packed(masks))
    x = torch.randn(3, 5, K).bfloat16()
    assert_as_accurate(layer(x).detach(), *expected(layer, masks, mode, 0.3, x))


@CHOICES
@STORED
def test_autocast(mode, stored):
    masks = random_masks(P, N, K)
    layer, x = choose(layer_of(original_of(stored), masks), mode, 0.3), torch.randn(3, 5, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    plain, _ = expected(copy.deepcopy(layer).to(torch.bfloat16), masks, mode, 0.3, x.bfloat16())
    assert_as_accurate(y.detach(), plain, expected(layer, masks, mode, 0.3, x)[1])


def test_bad_bits_and_masks():
    with pytest.raises(ValueError, match=r"uint8 \[P, 33, 5\], got \[3, 33, 4\] torch.uint8"):
        layer_of(original_of("linear"), random_masks(P, N, 32))
    with pytest.raises(ValueError, match=r"uint8 \[P, 33, 5\], got \[33, 5\]"):
        layer_of(original_of("linear"), random_masks(P, N, K)[0])
    with pytest.raises(TypeError, match="mask must be one of bool"):
        layer_of(original_of("linear"), random_masks(P, N, K).float())


def test_repr_names_the_sizes():
    text = repr(layer_of(original_of("no-bias"), selector=PersonaSelector()))
    assert "in_features=37, out_features=33, bias=False, personas=3" in text


@pytest.mark.parametrize("mode", ["uniform", "rows"])
@STORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forced_correction(mode, stored, dtype, compiled):
    """With few weights removed, as lists are made for: half the weights would cost as many roundings again.

    All sizes are compared at once: the largest error of three rows is chance, and another one on every machine.
    """
    masks = random_masks(P, N, K, removed=0.1)
    layer = choose(layer_of(original_of(stored, dtype), masks, form="correction"), mode, 0.3)
    run, compared = compiled(layer), []
    for tokens in (0, 1, 40):
        x = torch.randn(3, tokens, K).to(dtype)
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(run(x), y)
        compared.append((y, *expected(layer, masks, mode, 0.3, x)))
    assert_as_accurate(*(torch.cat(tensors, dim=1) for tensors in zip(*compared, strict=True)))
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("form", [None, "masked", "correction"])
def test_lists_follow_the_masks(monkeypatch, form):
    """Lists are made where they may be used, loaded masks get new ones, and copies have their own."""
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    masks = torch.ones(P, N, K, dtype=torch.bool)
    masks[:, 3, ::9] = False
    layer = layer_of(original_of("linear"), masks, form=form)
    assert (layer._columns is None) == (form == "masked")
    assert layer.density == pytest.approx(1 - 5 / (N * K))
    other = layer_of(original_of("linear"), torch.ones_like(masks), form=form)
    other.load_state_dict(layer.state_dict())
    assert sorted(layer.state_dict()) == ["bias", "bits", "weight"]
    x = torch.randn(3, 20, K)
    with torch.no_grad():
        for layer_ in (layer, other, copy.deepcopy(layer)):
            assert_as_accurate(choose(layer_, "uniform")(x), *expected(layer, masks, "uniform", 0.0, x))


def test_switching_allocates_nothing():
    selector = PersonaSelector()
    layers = [layer_of(original_of("linear"), selector=selector, form=form) for form in (None, "correction")]
    selector.select(0)
    index = selector.index(torch.device("cpu"))
    address = index.data_ptr()
    for choice in (1, 2, 0):
        selector.select(choice, 0.3)
        assert selector.index(torch.device("cpu")) is index
        assert (index.data_ptr(), index.tolist()) == (address, [choice])
    assert layers[0].selector is layers[1].selector


def test_unknown_form():
    with pytest.raises(ValueError, match="form must be None or one of masked, correction, got 'dense'"):
        layer_of(original_of("linear"), form="dense")
