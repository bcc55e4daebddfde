"""SparseLinear: the dense layer with a masked weight, in every way that a layer is used, and back again."""

import copy

import pytest
import torch
from oracles import DTYPES, assert_as_accurate
from torch import nn
from torch.nn import functional as F

from kernels import SparseLinear, SparseWeight

N, K = 33, 75
STORED = pytest.mark.parametrize("stored", ["linear", "conv1d", "no-bias"])


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored ``[K, N]``."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, rows)), nn.Parameter(torch.randn(rows))


def original_of(stored, dtype=torch.float32):
    return (Conv1D(N, K) if stored == "conv1d" else nn.Linear(K, N, bias=stored == "linear")).to(dtype)


def gated(original, mask):
    weight = original.weight.detach()
    return torch.where(mask, weight if isinstance(original, nn.Linear) else weight.T, 0)


def random_mask(removed=0.5):
    mask = torch.rand(N, K) > removed
    mask[0], mask[-1] = False, True
    return mask


@STORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 20, K), (0, 7, K)], ids=str)
def test_forward(stored, dtype, shape):
    original, mask, x = original_of(stored, dtype), random_mask(), torch.randn(shape).to(dtype)
    weight, bias = gated(original, mask), None if original.bias is None else original.bias.detach()
    plain, oracle = (
        F.linear(x, weight, bias),
        F.linear(x.double(), weight.double(), None if bias is None else bias.double()),
    )
    assert_as_accurate(SparseLinear.from_linear(original, mask)(x), plain, oracle)


@STORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_bit_for_bit(stored, dtype):
    original, mask = original_of(stored, dtype), random_mask()
    for layer in (SparseLinear.from_linear(original, mask), SparseLinear.from_linear(original)):
        linear = layer.to_linear()
        kept = mask if layer.values.numel() < N * K else torch.ones_like(mask)
        assert torch.equal(linear.weight, gated(original, kept))
        assert torch.equal(layer.weight.mask(), kept)
        assert (linear.bias is None) == (original.bias is None)
        assert linear.bias is None or torch.equal(linear.bias, original.bias)
        again = SparseLinear.from_linear(linear, kept)
        assert torch.equal(again.values, layer.values)


def test_only_the_kept_weights_are_held():
    layer = SparseLinear.from_linear(original_of("linear"), random_mask(0.9))
    assert list(layer.parameters()) == []
    assert layer.weight.nbytes + layer.bias.nbytes == sum(b.nbytes for b in layer.buffers())
    assert layer.values.numel() < 0.25 * N * K


def test_to_deepcopy_and_repr():
    layer, x = SparseLinear.from_linear(original_of("linear"), random_mask()), torch.randn(3, K)
    other = copy.deepcopy(layer).to(torch.bfloat16)
    assert (other.values.dtype, other.bits.dtype, other.offsets.dtype) == (torch.bfloat16, torch.uint8, torch.int64)
    assert torch.equal(other.to_linear().weight, layer.to_linear().weight.bfloat16())
    before = layer(x)
    other.values.zero_()
    assert torch.equal(layer(x), before)
    assert "in_features=75, out_features=33, bias=True, density=0." in repr(other)


def test_state_dict_of_another_mask():
    layers = [SparseLinear.from_linear(original_of("linear"), random_mask(share)) for share in (0.2, 0.7)]
    state, x = layers[0].state_dict(), torch.randn(3, K)
    assert sorted(state) == ["bias", "bits", "offsets", "values"]
    model = nn.Sequential(layers[1])
    model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(model(x), layers[0](x))


BROKEN = {
    "bits of another shape": (lambda s: s.update(bits=s["bits"][:-1]), r"bits must be \[33, 10\]"),
    "bits of another type": (lambda s: s.update(bits=s["bits"].char()), "bits must be"),
    "offsets of other bits": (lambda s: s.update(bits=torch.zeros_like(s["bits"])), "not those of the bits"),
    "offsets that fall": (lambda s: s.update(offsets=s["offsets"].flip(0)), "not those of the bits"),
    "values missing at the end": (lambda s: s.update(values=s["values"][:-1]), r"values must be \[\d+\], got"),
    "values in two dimensions": (lambda s: s.update(values=s["values"][None]), "values must be"),
    "no offsets": (lambda s: s.pop("offsets"), "Missing key"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_state_dicts_are_refused(case):
    layer = SparseLinear.from_linear(original_of("linear"), random_mask())
    change, message = BROKEN[case]
    state = dict(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        SparseLinear.from_linear(original_of("linear"), random_mask()).load_state_dict(state)


def test_autocast():
    original, mask, x = original_of("linear"), random_mask(), torch.randn(4, K)
    layer = SparseLinear.from_linear(original, mask)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16()))


@pytest.mark.parametrize("rows", [3, 20])
def test_compile(rows, compiled):
    layer, x = SparseLinear.from_linear(original_of("linear"), random_mask()), torch.randn(2, rows, K)
    assert torch.equal(compiled(layer)(x), layer(x))


def test_no_gradient_is_lost_silently():
    layer, x = SparseLinear.from_linear(original_of("linear"), random_mask()), torch.randn(3, K, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula|does not require grad"):
        layer(x).sum().backward()


def test_sizes_are_checked():
    weight = SparseWeight.from_dense(torch.randn(N, K), random_mask())
    with pytest.raises(ValueError, match=r"bias \[N\] must be \[33\], got \[32\]"):
        SparseLinear(weight, torch.zeros(32))
    with pytest.raises(ValueError, match=r"mask \[N, K\] must be \[33, 75\]"):
        SparseLinear.from_linear(original_of("linear"), random_mask()[:, 1:])
