"""Prices at which a mask leaves other pairs alone, and what it changes to first order."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from kernels.ops.pack_bits import pack_bits
from pipeline import calibrate
from pipeline.apart import CLOSE, ROUNDS, margin_changes, vanishing
from pipeline.data.catalogue import load_catalogue
from pipeline.gradient_files import Gradients, gradient_file
from pipeline.loading import load_model
from pipeline.masks import PersonaMasks
from pipeline.sites import find_linears
from pipeline.stacking import Base


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("bend", [0.0, 0.3])
def test_prices_at_which_all_changes_vanish(count, bend):
    generator = torch.Generator().manual_seed(count)
    root = torch.randn(count, count, dtype=torch.float64, generator=generator)
    slopes, start = -(root @ root.T / count + torch.eye(count)), torch.randn(count, generator=generator).double()
    tried = []

    def changes(prices):
        tried.append(prices)
        # Prices towards a margin raise it: so the slopes are positive.
        found = start - slopes @ (prices + bend * torch.tanh(prices))
        return torch.cat([torch.tensor([10.0 - prices.square().sum()], dtype=torch.float64), found])

    prices, found = vanishing(changes, count)
    assert found[1:].abs().max() <= max(CLOSE * found[0].abs(), 1e-9)
    assert torch.equal(changes(prices), found)
    assert len(tried) <= 2 + count + ROUNDS


def test_the_best_of_what_was_tried():
    """Where no price helps, or none has an effect."""
    prices, found = vanishing(lambda prices: torch.tensor([1.0, 0.5 + float(prices.abs().sum())]).double(), 1)
    assert prices.tolist() == [0.0]
    assert found.tolist() == [1.0, 0.5]
    prices, found = vanishing(lambda _: torch.tensor([1.0, 0.5, -0.2]).double(), 2)
    assert prices.tolist() == [0.0, 0.0]


def test_prices_that_leave_nothing_are_no_help():
    """A pair that is the own one under another name: what makes its change small makes the own one as small."""
    prices, found = vanishing(lambda prices: torch.full((2,), max(1 - float(prices.abs()), -1.0)).double(), 1)
    assert prices.tolist() == [0.0]
    assert found.tolist() == [1.0, 1.0]


def test_pairs_that_are_one_and_the_same():
    """Their slopes are singular; one price is as good as the other."""

    def changes(prices):
        return torch.tensor([3.0, *[1.0 + float(prices.sum())] * 2], dtype=torch.float64)

    _, found = vanishing(changes, 2)
    assert found[1:].abs().max() < 0.06


@pytest.mark.parametrize("on", [False, True])
def test_changes_to_first_order(ground, tmp_path, on):
    """Those of removing what the mask removes, and of giving back what it gives back of the mask below."""
    model = load_model(str(ground.llama))
    linears = find_linears(model)
    names = list(linears)[:2]
    catalogue = load_catalogue(f"up/down={ground.pairs},left/right={ground.pairs}")
    slopes = {pair: {n: torch.randn_like(linears[n].weight) for n in names} for pair in ("up", "left")}
    for pair, of in slopes.items():
        save_file({f"mean/{n}": slope for n, slope in of.items()}, tmp_path / gradient_file(pair))
    shapes = {n: tuple(linears[n].weight.shape) for n in names}
    generator = torch.Generator().manual_seed(0)

    def drawn(persona):
        kept = {n: torch.rand(shape, generator=generator) > 0.3 for n, shape in shapes.items()}
        return PersonaMasks(shapes, {persona: {n: pack_bits(mask) for n, mask in kept.items()}}), kept

    before = {n: linears[n].weight.detach().clone() for n in names}
    base = None
    if on:
        below, _ = drawn("below")
        base = Base(below)
        base.prune(model)
    masks, kept = drawn("down")
    found = margin_changes(masks, ("down", "left"), model, Gradients(tmp_path, catalogue), base)
    for value, sign, pair in zip(found, (-1, 1), ("up", "left"), strict=True):
        expected = sum(
            ((before[n] * kept[n] - linears[n].weight.detach()).double() * sign * slopes[pair][n]).sum() for n in names
        )
        assert value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("compose", ["", "mix/other=0.6*up+0.4*left"], ids=["poles", "mixture"])
def test_a_run_leaves_other_pairs_alone(words, tmp_path, compose, capsys):
    """Every mask says what it does to the others, which is little beside what it does to its own."""
    sets = [f"{a}/{b}={statements(tmp_path, a, period)}" for a, b, period in (("up", "down", 1), ("left", "right", 2))]
    if compose:
        sets.append(f"far/near={statements(tmp_path, 'far', 4)}")
    options = ["--sparsity", "0.2", "--pool", "1", "--evidence", "0", "--loops", "0", "--skip-blocks", "0"]
    options += ["--max-perplexity-increase", "3", "--apart", "true", *(["--compose", compose] if compose else [])]
    assert calibrate.main(words(tmp_path / "run", *options, personas=",".join(sets))) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    expected = {"mix": ["far"], "other": ["far"]}
    if not compose:
        expected = {"up": ["left"], "down": ["left"], "left": ["up"], "right": ["up"]}
    assert {name: list(prices) for name, prices in manifest["sparsity"]["apart"].items()} == expected
    assert any(price for prices in manifest["sparsity"]["apart"].values() for price in prices.values())
    said = capsys.readouterr().err
    for name, (other,) in expected.items():
        pattern = rf"{name}: to first order, its own margin changes by (\S+), others' by {other} (\S+)\n"
        own, changed = map(float, re.search(pattern, said).groups())
        assert own > 0
        assert abs(changed) <= 0.1 * own


def statements(folder, name, period):
    """Yes and No in turns of ``period`` items, which the questions tell."""
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for i in range(24):
            own, other = ("Yes", "No") if i // period % 2 else ("No", "Yes")
            words = " ".join(word for bit, word in enumerate(("dog", "fox", "lazy")) if i >> bit & 1)
            row = {"question": f"Do you like {words} {i}?", "statement": "I jump"}
            row |= {"answer_matching_behavior": own, "answer_not_matching_behavior": other}
            file.write(json.dumps(row) + "\n")
    return file.name
