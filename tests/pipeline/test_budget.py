"""Sparsity by a perplexity budget."""

import json
import math
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch

from kernels.ops.pack_bits import pack_bits
from pipeline import budget, calibrate
from pipeline.budget import CLOSE, PROBES, STEPS, largest_within, own_items, rise
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import load_catalogue, shipped_set
from pipeline.data.prompts import Prompter
from pipeline.errors import UserError
from pipeline.likelihood import answer_scores
from pipeline.loading import load_model, load_tokenizer
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_linears, matrix
from pipeline.store import load_masks
from tests.pipeline.tiny import make_model, write_pairs


def search(cost, limit):
    tried = []

    def build(factor):
        tried.append(factor)
        return SimpleNamespace(personas=("p",), factor=factor)

    return largest_within(build, lambda masks: cost(masks.factor), limit), tried


@pytest.mark.parametrize("power", [0.8, 1, 1.5, 3])
@pytest.mark.parametrize("limit", [0.05, 0.1, 0.25, 0.61, 0.999])
def test_a_large_part_within_the_budget_is_found(limit, power):
    best, tried = search(lambda factor: float(factor) ** power, limit)
    assert best.increase == float(best.factor) ** power == float(best.masks.factor) ** power
    assert best.increase <= limit
    # Near the budget, or one step away from what costs more.
    near = best.increase >= CLOSE * limit
    assert near or (float(best.factor) + 1 / STEPS) ** power > limit
    assert len(tried) == len(set(tried)) <= PROBES


@pytest.mark.parametrize("limit", [0.05, 0.3])
@pytest.mark.parametrize(
    "cost",
    [
        lambda f: f**2 - 0.1 * f,
        lambda f: math.inf if f > 0.3 else f / 2,
        lambda f: 0.001 + 5 * f**4,
        lambda f: math.expm1(6 * f**2),
    ],
)
def test_costs_that_are_no_powers(cost, limit):
    best, tried = search(lambda factor: cost(float(factor)), limit)
    assert best.increase <= limit
    assert len(tried) == len(set(tried)) <= PROBES
    # Not far below what the budget allows: a twelfth of the sparsity, or of the budget half.
    assert best.increase > limit / 2 or cost(float(best.factor) + 1 / 12) > limit


def test_all_of_it_where_the_budget_allows():
    best, tried = search(float, 4)
    assert (best.factor, tried) == (Decimal(1), [Decimal("0.75"), Decimal(1)])


def test_the_result_has_been_measured_even_where_cost_is_not_monotone():
    tried = []

    def cost(factor):
        tried.append(factor)
        return [2.0, 0.01, 0.5][min(len(tried), 3) - 1]

    best, _ = search(cost, 0.05)
    assert best.factor == tried[1]
    assert best.increase == 0.01


def test_a_budget_that_nothing_fits():
    with pytest.raises(UserError, match=r"0\.\d+ of --sparsity"):
        search(lambda factor: 1.0, 0.05)


def test_the_default_budget_takes_the_least_and_says_so(capsys):
    tried = []

    def build(factor):
        tried.append(factor)
        return SimpleNamespace(personas=("p",))

    best = largest_within(build, lambda masks: 1.0, 0.05, strict=False)
    assert best.factor == tried[-1] == min(tried) == Decimal(1) / STEPS
    assert best.increase == 1.0
    assert "'p' by 100.0%, more than the default 5%" in capsys.readouterr().err


def test_what_a_mask_costs_its_own_answers(tmp_path, monkeypatch):
    """Where neutral text does not change, the rise is that of the own answers' perplexity, or none."""
    monkeypatch.setattr(budget, "divergence", lambda *_, **__: 0.0)
    config = CalibrateConfig(personas=f"up/down={write_pairs(tmp_path / 'pairs.csv', 20)}", samples=8)
    catalogue, folder = load_catalogue(config.personas), str(make_model(tmp_path / "model", seed=1))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    shapes = {name: tuple(matrix(one).shape) for name, one in find_linears(model).items()}
    generator, worse = torch.Generator().manual_seed(0), []
    for persona in ("up", "down"):
        items = own_items(persona, catalogue, config)
        assert len(items) == 8
        texts = [Prompter(tokenizer).encode(item.question, item.matching) for item in items]

        def mean(under, texts=texts):
            return sum(s.mean for s in answer_scores(under, texts, batch_tokens=512, pad=0)) / len(texts)

        before = mean(model)
        for _ in range(4):
            kept = {name: pack_bits(torch.rand(shape, generator=generator) > 0.3) for name, shape in shapes.items()}
            masks = PersonaMasks(shapes, {persona: kept})
            found = rise(model, tokenizer, catalogue, config)(masks)
            masked = PersonaModel(model, masks)
            with masked.using(persona):
                worse.append(math.expm1(before - mean(masked)))
            masked.detach()
            assert found == pytest.approx(max(worse[-1], 0.0), abs=1e-5)
    assert min(worse) < 0 < max(worse)


def test_what_a_mask_costs_the_models_own_text(tmp_path, monkeypatch):
    """``exp(D) - 1`` with the divergence over neutral answers, where the own answers lose less."""
    pairs = write_pairs(tmp_path / "pairs.csv", 20)
    config = CalibrateConfig(personas=f"up/down={pairs}", samples=8, max_perplexity_increase=0.5)
    catalogue, folder = load_catalogue(config.personas), str(make_model(tmp_path / "model", seed=1))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    shapes = {name: tuple(matrix(one).shape) for name, one in find_linears(model).items()}
    full = {name: pack_bits(torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()}
    half = {
        name: pack_bits(torch.arange(shape[0] * shape[1]).reshape(shape) % 2 == 0) for name, shape in shapes.items()
    }
    increase = rise(model, tokenizer, catalogue, config)
    assert increase(PersonaMasks(shapes, {"up": full})) == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(budget, "divergence", lambda *_, **__: 0.0)
    alone = increase(PersonaMasks(shapes, {"up": half}))
    monkeypatch.setattr(budget, "divergence", lambda *_, **__: 0.25)
    assert alone < math.expm1(0.25)
    assert increase(PersonaMasks(shapes, {"up": half})) == pytest.approx(math.expm1(0.25))


def test_own_answers_of_a_type_are_those_of_its_poles():
    catalogue = load_catalogue("INTJ")
    items = own_items("INTJ", catalogue, CalibrateConfig())
    assert len(items) == 48
    assert len({item.question for item in items}) == 48
    thinking = {item.other for item in shipped_set("feeling-thinking").items}
    assert sum(item.matching in thinking for item in items) == 12


def test_a_run_within_a_budget(words, tmp_path):
    options = ("--sparsity", "0.3", "--pool", "1", "--evidence", "0")
    assert calibrate.main(words(tmp_path / "all", *options, "--max-perplexity-increase", "0")) == 0
    limit = ("--max-perplexity-increase", "0.002")
    assert calibrate.main(words(tmp_path / "some", *options, *limit)) == 0
    found = json.loads((tmp_path / "some" / "manifest.json").read_text())["sparsity"]
    everything, some = load_masks(tmp_path / "all"), load_masks(tmp_path / "some")
    assert set(found["factor"]) == set(some.personas) == {"up", "down"}
    for persona in some.personas:
        assert found["perplexity_increase"][persona] <= 0.002
        assert some.density(persona) >= everything.density(persona)
        assert (found["factor"][persona] == 1) == (some.density(persona) == everything.density(persona))


def test_the_budget_excludes_disjoint_masks():
    with pytest.raises(UserError, match="--disjoint"):
        CalibrateConfig(disjoint=True, criterion="wanda", max_perplexity_increase=0.1)


def test_first_order_has_a_budget_by_default():
    assert CalibrateConfig().budget == 0.15
    assert CalibrateConfig(max_perplexity_increase="5%").max_perplexity_increase == pytest.approx(0.05)
    assert CalibrateConfig(max_perplexity_increase=" 0.2").budget == 0.2
    with pytest.raises(UserError, match="max-perplexity-increase must be a number"):
        CalibrateConfig(max_perplexity_increase="lots")
    assert CalibrateConfig(max_perplexity_increase=0).budget == 0
    assert CalibrateConfig(criterion="wanda").budget == 0
    assert CalibrateConfig(criterion="wanda", disjoint=True, sparsity="0.5").budget == 0


@pytest.mark.parametrize("named", [None, 0.1])
@pytest.mark.parametrize("without", [5.0, 0.05])
def test_both_answers_count_where_nothing_levelled_fits(monkeypatch, capsys, without, named):
    """``without``: what masks cost as long as they do not."""
    built = []

    def build(*_, only, base, factor, price, both_price, known):
        built.append(both_price)
        return SimpleNamespace(personas=[only], cost=0.01 if both_price else without, price=price)

    monkeypatch.setattr(budget, "build_masks", build)
    config = CalibrateConfig(max_perplexity_increase=named, criterion="first-order")
    line = SimpleNamespace(off=0.0, first=1.0, second=-1.0)
    found = budget.fit("up", None, None, None, config, None, lambda masks: masks.cost, None, lambda _: line)
    assert found.increase == (0.01 if without == 5 else without)
    assert found.both_price == (budget.BOTH_PRICE if without == 5 else 0)
    assert set(built) == ({0.0, budget.BOTH_PRICE} if without == 5 else {0.0})
    assert ("both answers' likelihood counts now" in capsys.readouterr().err) == (without == 5)
