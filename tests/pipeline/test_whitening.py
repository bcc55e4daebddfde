"""The weights of answers: against the discriminant written out, and gradients at coordinates against autograd."""

import math

import pytest
import torch
from torch import nn

from pipeline.data.prompts import Encoded
from pipeline.gradients import SCALE
from pipeline.loading import load_model
from pipeline.objectives import WeightedAnswer
from pipeline.sites import find_linears, matrix
from pipeline.sketching import Coordinates, sketching
from pipeline.whitening import contrast_weights, standardised, weights_beside


def gradients(items=6, neutral=5, size=40):
    shared = 3 * torch.randn(size, dtype=torch.float64)
    return torch.randn(2 * items + neutral, size, dtype=torch.float64) + torch.randn(2 * items + neutral, 1) * shared


@pytest.mark.parametrize(("loops", "against"), [(0, 0.0), (0, 0.5), (1, 0.5), (4, 0.0), (4, 0.5)])
@pytest.mark.parametrize("neutral", [0, 5])
@pytest.mark.parametrize("items", [1, 6])
@pytest.mark.parametrize("ridge", [1e-3, 0.03, 10.0])
def test_the_discriminant_written_out(items, neutral, ridge, loops, against):
    g = gradients(items, loops + neutral)
    own, other, repeated, rest = g.split([items, items, loops, neutral])
    weights = contrast_weights(g @ g.T, items, loops, against=against, ridge=ridge)
    floor = ridge * g[: 2 * items].square().sum(1).mean()
    scatter = floor * torch.eye(40, dtype=torch.float64)
    for group in (own - own.mean(0), other - other.mean(0), repeated - repeated.mean(0), rest):
        scatter += group.T @ group if len(group) else 0
    wanted = own.mean(0) - other.mean(0)
    if loops:
        wanted = wanted + against * (own.mean(0) - repeated.mean(0))
    direction = torch.linalg.solve(scatter, wanted) * floor
    assert torch.allclose(weights @ g, direction, atol=1e-9)
    against = against if loops else 0
    assert weights[:items].sum().item() == pytest.approx(1 + against)
    assert weights[items : 2 * items].sum().item() == pytest.approx(-1)
    assert weights[2 * items : 2 * items + loops].sum().item() == pytest.approx(-against)


def test_what_all_texts_share_is_left_alone():
    g = gradients(20, 20)
    shared = torch.linalg.svd(g).Vh[0]
    plain = g[:20].mean(0) - g[20:40].mean(0)
    found = contrast_weights(g @ g.T, 20) @ g
    assert (found @ shared).abs() / found.norm() < 0.1 * (plain @ shared).abs() / plain.norm()


@pytest.mark.parametrize(("loops", "against"), [(0, 0.0), (4, 0.5)])
@pytest.mark.parametrize("items", [1, 20])
def test_other_pairs_are_left_alone(items, loops, against):
    """As a constraint where they weigh much; what is held is the contrast per change of the model, written out."""
    g = gradients(items, loops + 5 + 2)
    others = g[-2:].clone()
    own, other, repeated, rest = g[:-2].split([items, items, loops, 5])
    wanted = (1 + against) * own.mean(0) - other.mean(0)
    if loops:
        wanted = wanted - against * repeated.mean(0)
    floor = 0.03 * g[: 2 * items].square().sum(1).mean()
    scatter = floor * torch.eye(40, dtype=torch.float64)
    for group in (own - own.mean(0), other - other.mean(0), repeated - repeated.mean(0), rest):
        scatter += group.T @ group if len(group) else 0
    alone = torch.linalg.solve(scatter, wanted)
    for times in (0.0, 3.0, 1e4):
        g[-2:] = times * others
        weights, held = weights_beside(g @ g.T, 2, items, loops, against=against)
        direction = weights @ g
        expected = torch.linalg.solve(scatter + times**2 * others.T @ others, wanted)
        assert torch.allclose(direction, floor * expected, atol=1e-6)
        assert held == pytest.approx(math.sqrt(float(wanted @ expected) / float(wanted @ alone)), rel=1e-6)
        # The change of the model that this direction makes, others' included, for one unit of contrast.
        cost = direction @ (scatter + times**2 * others.T @ others) @ direction / (wanted @ direction) ** 2
        assert held == pytest.approx(math.sqrt(float(1 / (wanted @ alone) / cost)), rel=1e-6)
    assert (direction @ others.T).abs().max() < 1e-4 * (alone @ others.T).abs().max() * floor
    assert held < 1


def test_without_other_pairs_nothing_is_lost():
    g = gradients()
    weights, held = weights_beside(g @ g.T, 0, 6)
    assert torch.equal(weights, contrast_weights(g @ g.T, 6))
    assert held == 1
    assert weights_beside(torch.zeros(19, 19), 2, 6)[1] == 1


def test_a_high_ridge_and_no_gradients_give_plain_means():
    g = gradients()
    expected = torch.tensor([1 / 6] * 6 + [-1 / 6] * 6 + [0.0] * 5, dtype=torch.float64)
    assert torch.allclose(contrast_weights(g @ g.T, 6, ridge=1e9), expected, atol=1e-7)
    assert torch.equal(contrast_weights(torch.zeros(17, 17), 6), expected)


@pytest.mark.parametrize(
    ("shape", "items", "loops"), [((4, 5), 1, 0), ((4, 4), 3, 0), ((4, 4), 0, 0), ((4, 4), 2, 1), ((4, 4), 1, -1)]
)
def test_no_gram_matrix_of_so_many_items(shape, items, loops):
    with pytest.raises(ValueError, match="no Gram matrix"):
        contrast_weights(torch.zeros(shape), items, loops)


def test_standardised():
    """Every entry over its standard deviation within the three groups, and a tenth of the mean variance more."""
    values = [[3.0, 0.0], [5.0, 0.0], [1.0, 4.0], [1.0, 4.0], [0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]
    variances = [(2 * 1 + 0 + 2 * 4) / 7, 0.0]
    scale = [math.sqrt(v + sum(variances) / 20) for v in variances]
    given = torch.tensor(values)
    for neutral, spread in ((given[4:], scale), (given[:0], [math.sqrt(2 / 4 + 2 / 80), math.sqrt(2 / 80)])):
        got = standardised(given[:2], given[2:4], neutral).tolist()
        for row, found in zip(values, got, strict=False):
            assert found == pytest.approx([v / s for v, s in zip(row, spread, strict=True)])
        assert len(got) == 4 + len(neutral)
    beside = standardised(given[:2], given[2:4], given[4:], beside=[2 * given[0], given[3]])
    assert torch.equal(beside[:7], standardised(given[:2], given[2:4], given[4:]))
    assert torch.allclose(beside[7:], torch.stack([2 * beside[0], beside[3]]))
    same = given[:1].expand(2, 2)
    assert torch.equal(standardised(same, same, given[:0]), torch.cat([same, same]))


def answers(count=3):
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        ids = torch.randint(2, 300, (5 + 3 * number,), generator=generator).tolist()
        yield WeightedAnswer(Encoded(tuple(ids), 2 + number, range(0)), 1.0 / (len(ids) - 2 - number))


@pytest.mark.parametrize(
    ("family", "exclude"), [("llama", ""), ("gpt2", ""), ("llama", r"layers\.0"), ("gpt2", r"h\.0")]
)
def test_sketches_are_entries_of_each_answers_gradient(ground, family, exclude):
    model = load_model(str(getattr(ground, family)), torch.float64).requires_grad_(False)
    linears = find_linears(model, exclude=exclude)
    coordinates = Coordinates(linears, seed=3, count=500)
    batch = list(answers())
    with sketching(linears, coordinates, 0) as sketcher:
        sketches = sketcher.sketch(model, batch, 0) / SCALE
    assert not sketcher.scattered
    assert all(p.grad is None for p in model.parameters())
    for row, answer in enumerate(batch):
        weights = [module.weight.requires_grad_(True) for module in linears.values()]
        with torch.enable_grad():
            logits = model(torch.tensor([answer.encoded.ids])).logits[0].log_softmax(-1)
            start = answer.encoded.answer
            picked = [logits[t - 1, answer.encoded.ids[t]] for t in range(start, len(answer.encoded))]
            found = torch.autograd.grad(torch.stack(picked).mean(), weights)
        for (name, module), gradient in zip(linears.items(), found, strict=True):
            shaped = gradient if matrix(module) is module.weight else gradient.T
            expected = shaped[coordinates.rows[name], coordinates.columns[name]]
            sketched = sketches[row, coordinates.places[name]]
            assert torch.allclose(
                sketched.double(), expected, rtol=1e-4, atol=1e-7 + 1e-5 * float(expected.abs().max())
            )


def test_hooks_are_gone_afterwards(ground):
    model = load_model(str(ground.llama)).requires_grad_(False)
    before = model(torch.tensor([[3, 4, 5]])).logits
    with sketching(find_linears(model), Coordinates(find_linears(model), 0, 10), 0):
        pass
    after = model(torch.tensor([[3, 4, 5]])).logits
    assert torch.equal(before, after)
    assert not after.requires_grad


def test_a_layer_that_reads_some_tokens_only_is_named(ground):
    model = load_model(str(ground.llama)).requires_grad_(False)
    linears = find_linears(model)

    class Chosen(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return torch.cat([self.linear(x[:, :1]), x.new_zeros(len(x), x.shape[1] - 1, 32)], 1)

    name, block = "model.layers.0.self_attn.o_proj", model.model.layers[0].self_attn
    block.o_proj = Chosen(block.o_proj)
    batch = list(answers())
    with sketching(linears, Coordinates(linears, 0, 500), 0) as sketcher:
        sketches = sketcher.sketch(model, batch, 0)
    assert sketcher.scattered == {name}
    assert not sketches[:, sketcher.coordinates.places[name]].any()
    assert sketches.any()


def test_passes_without_gradients_are_not_looked_at(ground):
    """Some models differentiate their last cycle only."""
    model = load_model(str(ground.llama)).requires_grad_(False)
    linears, batch = find_linears(model), list(answers())
    with sketching(linears, Coordinates(linears, 0, 500), 0) as sketcher:
        expected = sketcher.sketch(model, batch, 0).clone()
    block = model.model.layers[1].mlp
    plain = block.forward

    def twice(x):
        with torch.no_grad():
            plain(x)
        return plain(x)

    block.forward = twice
    with sketching(linears, Coordinates(linears, 0, 500), 0) as sketcher:
        assert torch.equal(sketcher.sketch(model, batch, 0), expected)
