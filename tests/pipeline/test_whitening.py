"""The weights of answers: against the discriminant written out, and gradients at coordinates against autograd."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config import CalibrateConfig
from pipeline.data.forms import NEUTRAL
from pipeline.data.prompts import Encoded
from pipeline.gradients import SCALE, backward_each
from pipeline.loading import load_model
from pipeline.objectives import WeightedAnswer, likelihood_units, margin_units
from pipeline.sites import find_linears, matrix
from pipeline.sketching import WEIGHTS, Coordinates, single_answers, sketching, weighted
from pipeline.whitening import contrast_weights, standardised


def gradients(items=6, neutral=5, size=40):
    shared = 3 * torch.randn(size, dtype=torch.float64)
    return torch.randn(2 * items + neutral, size, dtype=torch.float64) + torch.randn(2 * items + neutral, 1) * shared


@pytest.mark.parametrize("neutral", [0, 5])
@pytest.mark.parametrize("items", [1, 6])
@pytest.mark.parametrize("ridge", [1e-3, 0.03, 10.0])
def test_the_discriminant_written_out(items, neutral, ridge):
    g = gradients(items, neutral)
    plus, minus, rest = g[:items], g[items : 2 * items], g[2 * items :]
    weights = contrast_weights(g @ g.T, items, ridge)
    floor = ridge * g[: 2 * items].square().sum(1).mean()
    scatter = floor * torch.eye(40, dtype=torch.float64)
    for own in (plus - plus.mean(0), minus - minus.mean(0), rest):
        scatter += own.T @ own
    direction = torch.linalg.solve(scatter, plus.mean(0) - minus.mean(0)) * floor
    assert torch.allclose(weights @ g, direction, atol=1e-9)
    assert weights[:items].sum().item() == pytest.approx(1)
    assert weights[items : 2 * items].sum().item() == pytest.approx(-1)


def test_what_all_texts_share_is_left_alone():
    g = gradients(20, 20)
    shared = torch.linalg.svd(g).Vh[0]
    plain = g[:20].mean(0) - g[20:40].mean(0)
    found = contrast_weights(g @ g.T, 20) @ g
    assert (found @ shared).abs() / found.norm() < 0.1 * (plain @ shared).abs() / plain.norm()


def test_a_high_ridge_and_no_gradients_give_plain_means():
    g = gradients()
    expected = torch.tensor([1 / 6] * 6 + [-1 / 6] * 6 + [0.0] * 5, dtype=torch.float64)
    assert torch.allclose(contrast_weights(g @ g.T, 6, 1e9), expected, atol=1e-7)
    assert torch.equal(contrast_weights(torch.zeros(17, 17), 6), expected)


@pytest.mark.parametrize(("shape", "items"), [((4, 5), 1), ((4, 4), 3), ((4, 4), 0)])
def test_no_gram_matrix_of_so_many_items(shape, items):
    with pytest.raises(ValueError, match="no Gram matrix"):
        contrast_weights(torch.zeros(shape), items)


def test_standardised():
    """Every entry over its standard deviation within the three groups, and a tenth of the mean variance more."""
    values = [[3.0, 0.0], [5.0, 0.0], [1.0, 4.0], [1.0, 4.0], [0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]
    variances = [(2 * 1 + 0 + 2 * 4) / 7, 0.0]
    scale = [math.sqrt(v + sum(variances) / 20) for v in variances]
    given = torch.tensor(values)
    for neutral, spread in ((given[4:], scale), (given[:0], [math.sqrt(2 / 4 + 2 / 80), math.sqrt(2 / 80)])):
        got = standardised(given[:4], neutral).tolist()
        for row, found in zip(values, got, strict=False):
            assert found == pytest.approx([v / s for v, s in zip(row, spread, strict=True)])
        assert len(got) == 4 + len(neutral)
    same = given[:1].expand(4, 2)
    assert torch.equal(standardised(same, given[:0]), same)


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
    with sketching(linears, coordinates) as sketcher:
        backward_each(model, batch, 0, sketcher.begin)
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
            sketched = sketcher.out[row, coordinates.places[name]] / SCALE
            assert torch.allclose(
                sketched.double(), expected, rtol=1e-4, atol=1e-7 + 1e-5 * float(expected.abs().max())
            )


def test_hooks_are_gone_afterwards(ground):
    model = load_model(str(ground.llama)).requires_grad_(False)
    before = model(torch.tensor([[3, 4, 5]])).logits
    with sketching(find_linears(model), Coordinates(find_linears(model), 0, 10)):
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
    with sketching(linears, Coordinates(linears, 0, 500)) as sketcher:
        backward_each(model, batch, 0, sketcher.begin)
    assert sketcher.scattered == {name}
    assert not sketcher.out[:, sketcher.coordinates.places[name]].any()
    assert sketcher.out.any()


def test_objectives_take_the_weights(tmp_path):
    encoded = [one.encoded for one in answers(6)]
    pair, lone = margin_units(encoded[:2], encoded[2:4]), likelihood_units(encoded[:1])
    objectives = {"up": pair, "alone": lone, NEUTRAL: likelihood_units(encoded[4:])}
    singles = single_answers(objectives)
    assert list(singles) == [NEUTRAL, "up"]
    assert [unit[0].encoded for unit in singles["up"]] == encoded[:4]
    assert all(unit[0].weight * unit[0].tokens == pytest.approx(1) for unit in singles["up"])
    save_file({"up": torch.tensor([0.25, 0.75, -0.5, -0.5, 0.1, -0.2])}, tmp_path / WEIGHTS)
    found = weighted(objectives, tmp_path)
    assert found["alone"] is lone
    assert found[NEUTRAL] is objectives[NEUTRAL]
    sums = [[round(one.weight * one.tokens, 6) for one in unit] for unit in found["up"]]
    assert sums == [[0.25, -0.5], [0.75, -0.5], [0.1], [-0.2]]
    assert [one.encoded for unit in found["up"] for one in unit] == [encoded[i] for i in (0, 2, 1, 3, 4, 5)]


def test_the_pass_writes_them(ground, tmp_path):
    """Through Lightning, in small batches: the discriminant of the gradients themselves."""
    from pipeline.calibration import run_pass
    from pipeline.gradients import ObjectiveData
    from pipeline.sketching import SketchModule

    encoded = [one.encoded for one in answers(6)]
    objectives = {"up": margin_units(encoded[:2], encoded[2:4]), NEUTRAL: likelihood_units(encoded[4:])}
    singles = single_answers(objectives)
    config = CalibrateConfig(model=str(ground.llama), output=tmp_path / "run", accelerator="cpu", devices="1")
    module = SketchModule(config, tmp_path, 0, {name: len(units) for name, units in singles.items()})
    run_pass(config, module, ObjectiveData(singles, 16), inference=False)
    model = load_model(str(ground.llama), torch.float64).requires_grad_(False)
    linears = find_linears(model)
    rows = []
    for unit in (*singles["up"], *singles[NEUTRAL]):
        with sketching(linears, Coordinates(linears, config.seed)) as sketcher:
            backward_each(model, [dataclasses.replace(unit[0])], 0, sketcher.begin)
        rows.append(sketcher.out[0] / SCALE)
    rows = torch.stack(rows).double()
    every = standardised(rows[:4], rows[4:])
    expected = contrast_weights(every @ every.T, 2)
    assert torch.allclose(load_file(str(tmp_path / WEIGHTS))["up"], expected, atol=1e-4)
