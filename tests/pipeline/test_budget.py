"""Sparsity by a perplexity budget."""

import json
from decimal import Decimal
from types import SimpleNamespace

import pytest

from pipeline import calibrate
from pipeline.budget import CLOSE, PROBES, STEPS, largest_within
from pipeline.config import CalibrateConfig
from pipeline.errors import UserError
from pipeline.store import load_masks


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


def test_all_of_it_where_the_budget_allows():
    best, tried = search(float, 1.5)
    assert (best.factor, tried) == (Decimal(1), [Decimal(1)])


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
    assert CalibrateConfig().budget == 0.05
    assert CalibrateConfig(max_perplexity_increase=0).budget == 0
    assert CalibrateConfig(criterion="wanda").budget == 0
    assert CalibrateConfig(criterion="wanda", disjoint=True, sparsity="0.5").budget == 0
