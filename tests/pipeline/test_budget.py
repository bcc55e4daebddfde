"""Sparsity by a perplexity budget."""

import json
from decimal import Decimal
from types import SimpleNamespace

import pytest

from pipeline import calibrate
from pipeline.budget import PROBES, largest_within
from pipeline.config import CalibrateConfig
from pipeline.errors import UserError
from pipeline.store import load_masks


def search(cost, limit):
    tried = []

    def build(factor):
        tried.append(factor)
        return SimpleNamespace(personas=("p",), factor=factor)

    return largest_within(build, lambda masks: cost(masks.factor), limit), tried


@pytest.mark.parametrize("limit", [0.1, 0.25, 0.61, 0.999])
def test_bisection_finds_the_largest_part_within_the_budget(limit):
    best, tried = search(float, limit)
    assert float(best.factor) <= limit < float(best.factor) + 2.0**-PROBES
    assert best.increase == float(best.factor) == float(best.masks.factor)
    assert len(tried) == PROBES + 1


def test_all_of_it_where_the_budget_allows():
    best, tried = search(float, 1.5)
    assert (best.factor, tried) == (Decimal(1), [Decimal(1)])


def test_the_result_has_been_measured_even_where_cost_is_not_monotone():
    cost = {Decimal(1): 2.0, Decimal("0.5"): 0.01, Decimal("0.75"): 0.5}
    best, _ = search(lambda factor: cost.get(factor, 0.2), 0.05)
    assert best.factor == Decimal("0.5")


def test_a_budget_that_nothing_fits():
    with pytest.raises(UserError, match=r"0\.03125 of --sparsity"):
        search(lambda factor: 1.0, 0.05)


def test_a_run_within_a_budget(words, tmp_path):
    options = ("--sparsity", "0.3", "--pool", "1", "--evidence", "0")
    assert calibrate.main(words(tmp_path / "all", *options)) == 0
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
