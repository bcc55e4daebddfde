"""The masked product and the layer around it, against float64 and against the dense layer."""

import copy

import pytest
import torch
from torch.nn import functional as F

import kernels

SHAPES = [(1, 1, 1), (5, 7, 19), (0, 4, 8), (17, 33, 64), (3, 5, 129)]


def case(rows, outputs, inputs, personas=3, dtype=torch.float32):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    masks = torch.rand(personas, outputs, inputs) > 0.4
    masks[0, 0], masks[-1, -1] = False, True
    persona = (torch.arange(rows) % (personas + 1) - 1).to(torch.int32)
    return x, weight, masks, persona


def oracle(x, weight, masks, persona, gamma, bias):
    """Row by row in float64: y = (W * G) x + b."""
    rows = []
    for row, index in zip(x.double(), persona.tolist(), strict=True):
        gate = (
            torch.ones(weight.shape).double() if index < 0 else masks[index].double() + gamma * (~masks[index]).double()
        )
        rows.append((weight.double() * gate) @ row + (0 if bias is None else bias.double()))
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[0]).double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_error_at_most_twice_that_of_dense_pytorch(shape, dtype, gamma):
    x, weight, masks, persona = case(*shape, dtype=dtype)
    bias = torch.randn(shape[1]).to(dtype)
    expected = oracle(x, weight, masks, persona, gamma, bias)
    got = kernels.masked_linear(x, weight, kernels.pack_bits(masks), persona, gamma, bias)
    # What plain PyTorch makes of the same rows, each with its materialised gate in the same dtype.
    gates = [torch.ones_like(weight) if i < 0 else masks[i].to(dtype) + gamma * (~masks[i]).to(dtype) for i in persona]
    plain = torch.stack([F.linear(row, weight * g, bias) for row, g in zip(x, gates, strict=True)]) if len(x) else got
    error, allowed = (got.double() - expected).abs(), (plain.double() - expected).abs()
    assert error.numel() == 0 or error.max() <= 2 * allowed.max() + torch.finfo(dtype).eps


def test_one_persona_for_all_rows():
    x, weight, masks, _ = case(4, 6, 10)
    for index in (-1, 2):
        one = kernels.masked_linear(x, weight, kernels.pack_bits(masks), torch.tensor([index], dtype=torch.int32))
        expected = weight if index < 0 else weight * masks[index]
        assert torch.equal(one, F.linear(x, expected))


def test_gradients():
    x, weight, masks, persona = case(5, 4, 9, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    bits = kernels.pack_bits(masks)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda a, w, b: kernels.masked_linear(a, w, bits, persona, 0.25, b), inputs)


def test_opcheck():
    x, weight, masks, persona = case(4, 3, 9)
    arguments = (x.requires_grad_(), weight.requires_grad_(), kernels.pack_bits(masks), persona, 0.2, None)
    torch.library.opcheck(kernels.masked_linear, arguments)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"gamma": 1.0}, "gamma"),
        ({"persona": torch.tensor([3], dtype=torch.int32)}, "persona must lie in -1..2"),
        ({"bits": torch.zeros(3, 3, 1, dtype=torch.uint8)}, "bits"),
        ({"weight": torch.zeros(3, 9, dtype=torch.bfloat16)}, "weight"),
    ],
    ids=["gamma", "persona", "bits", "dtype"],
)
def test_bad_arguments_name_themselves(change, error):
    x, weight, masks, persona = case(4, 3, 9)
    arguments = {"x": x, "weight": weight, "bits": kernels.pack_bits(masks), "persona": persona, "gamma": 0.0} | change
    with pytest.raises((ValueError, TypeError), match=error):
        kernels.masked_linear(**arguments)


class Conv1D(torch.nn.Module):
    """GPT-2's layer: weight [K, N]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = (
            nf,
            torch.nn.Parameter(torch.randn(nx, nf)),
            torch.nn.Parameter(torch.randn(nf)),
        )


@pytest.fixture(params=["linear", "conv1d"])
def pair(request):
    """A dense layer and the masked one around it, with three masks."""
    dense = torch.nn.Linear(19, 7) if request.param == "linear" else Conv1D(7, 19)
    masks = torch.rand(3, 7, 19) > 0.5
    return dense, kernels.MaskedLinear.from_linear(dense, masks), masks


def effective(layer, masks, index, gamma=0.0):
    return layer.matrix * (masks[index] + gamma * ~masks[index])


def test_off_is_the_original_layer_bit_for_bit(pair):
    dense, layer, _ = pair
    x = torch.randn(2, 5, 19)
    flat = x.reshape(-1, 19)
    expected = (
        dense(x) if isinstance(dense, torch.nn.Linear) else torch.addmm(dense.bias, flat, dense.weight).view(2, 5, 7)
    )
    assert torch.equal(layer(x), expected)
    layer.select(1)
    assert not torch.equal(layer(x), expected)
    layer.select(None)
    assert torch.equal(layer(x), expected)
    assert layer.weight is dense.weight


@pytest.mark.parametrize("materialized", [False, True])
def test_uniform_choice(pair, materialized):
    _, layer, masks = pair
    x = torch.randn(2, 5, 19)
    for index, gamma in ((0, 0.0), (2, 0.4)):
        layer.select(index, gamma)
        layer.materialize(materialized)
        torch.testing.assert_close(layer(x), F.linear(x, effective(layer, masks, index, gamma), layer.bias))


def test_one_persona_per_sequence_and_beams(pair):
    _, layer, masks = pair
    layer.select([2, -1])
    for x in (torch.randn(2, 5, 19), torch.randn(6, 4, 19)):
        got, share = layer(x), x.shape[0] // 2
        torch.testing.assert_close(got[:share], F.linear(x[:share], effective(layer, masks, 2), layer.bias))
        torch.testing.assert_close(got[share:], F.linear(x[share:], layer.matrix, layer.bias))
    with pytest.raises(ValueError, match="2 personas"):
        layer(torch.randn(1, 3, 19))


def test_switching_writes_into_one_static_buffer():
    selector = kernels.PersonaSelector()
    before = selector.index(torch.device("cpu"))
    selector.select(1)
    assert selector.index(torch.device("cpu")) is before
    assert before.tolist() == [1]


def test_bad_choices(pair):
    _, layer, _ = pair
    with pytest.raises(IndexError, match="persona 3"):
        layer.select(3)
    with pytest.raises(ValueError, match="gamma"):
        layer.select(1, 1.0)


@pytest.mark.parametrize("choice", [None, 1, [0, -1]], ids=["off", "uniform", "rows"])
@pytest.mark.parametrize("materialized", [False, True])
def test_compiles_whole(pair, choice, materialized):
    _, layer, _ = pair
    layer.select(choice)
    layer.materialize(materialized)
    x = torch.randn(2, 3, 19)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), layer(x))


def test_copies_states_and_dtypes(pair):
    _, layer, masks = pair
    layer.select(1)
    x = torch.randn(4, 19)
    twin = copy.deepcopy(layer)
    twin.select(None)
    torch.testing.assert_close(layer(x), F.linear(x, effective(layer, masks, 1), layer.bias))
    twin.bits.zero_()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.mask(1), masks[1])
    half = copy.deepcopy(layer).to(torch.bfloat16)
    half.select(1)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
