"""Masks on top of the mask of an earlier run: what they remove, what they were measured on, and their controls."""

import json
from types import SimpleNamespace

import pytest
import torch

from kernels.ops.pack_bits import unpack_bits
from pipeline import calibrate, evaluate
from pipeline.conditions import check
from pipeline.controls import add_random
from pipeline.criteria import Layer, Slopes, first_order
from pipeline.data.catalogue import PersonaSet
from pipeline.errors import UserError
from pipeline.fingerprint import model_fingerprints
from pipeline.loading import load_model
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.sites import find_layers, matrix
from pipeline.stacking import Base, base_files, base_masks, pruned, under
from pipeline.stats import ChannelStats
from pipeline.store import STATISTICS, load_masks, load_statistics

PAIR = PersonaSet("up", "down", (), "test")


@pytest.fixture(scope="module")
def half(words, tmp_path_factory):
    """A general mask at 50 %."""
    folder = tmp_path_factory.mktemp("stacking") / "half"
    assert calibrate.main(words(folder, "--criterion", "neutral", "--sparsity", "0.5", "--samples", "8")) == 0
    return folder


@pytest.fixture(scope="module")
def run(words, half):
    """Persona masks on it, with the default criterion."""
    folder = half.parent / "run"
    options = ("--on", f"{half}:up", "--sparsity", "0.2", "--max-perplexity-increase", "5")
    assert calibrate.main(words(folder, *options)) == 0
    return folder


def test_what_is_below_is_changed_within_the_share(half, run):
    """The default criterion takes more, and gives back; both count."""
    below, above = load_masks(half), load_masks(run)
    assert set(above.shapes) == set(below.shapes)
    further = back = 0
    for layer in below.shapes:
        base = below.mask("up", layer)
        assert base.float().mean() == 0.5
        for persona in ("up", "down"):
            mask = above.mask(persona, layer)
            further += int((base & ~mask).sum())
            back += int((mask & ~base).sum())
            assert ((base ^ mask).sum(1) <= int(0.2 * base.shape[1]) + 1).all()
    assert further > 0
    assert back > 0
    assert any(not torch.equal(above.bits["up"][layer], above.bits["down"][layer]) for layer in above.shapes)


def test_measured_on_the_pruned_model(ground, half, run):
    """The statistics of a deep layer are those of a model whose weights were multiplied by hand."""
    model = load_model(str(ground.llama))
    layers, masks = find_layers(model), load_masks(half)
    fingerprints = model_fingerprints(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            matrix(layer).copy_(matrix(layer) * masks.mask("up", name))
    again, _ = pruned(load_model(str(ground.llama)), f"{half}:up")
    assert model_fingerprints(find_layers(again)) == fingerprints
    for name, layer in find_layers(again).items():
        assert torch.equal(matrix(layer), matrix(layers[name]))
    whole, of_pruned = (load_statistics(folder / STATISTICS) for folder in (half, run))
    last = whole.sites[-1].name
    assert not torch.allclose(whole.channels("up", last).mean_square, of_pruned.channels("up", last).mean_square)
    first = whole.sites[0].name
    assert torch.equal(load_statistics(run / STATISTICS).sums[first], of_pruned.sums[first])


@pytest.mark.parametrize("criterion", ["wanda", "first-order-damage"])
def test_other_criteria_give_nothing_back(words, half, tmp_path, criterion):
    options = ("--criterion", criterion, "--on", f"{half}:up", "--sparsity", "0.6", "--samples", "8")
    assert calibrate.main(words(tmp_path / "run", *options)) == 0
    below, above = load_masks(half), load_masks(tmp_path / "run")
    for layer in below.shapes:
        for persona in ("up", "down"):
            assert not (above.mask(persona, layer) & ~below.mask("up", layer)).any()


def test_what_is_given_back_is_chosen_by_the_same_rule():
    """In every row, of what may go and what may come back, the most gain per damage; none against its gradient."""
    generator = torch.Generator().manual_seed(3)
    whole, margin = torch.randn(6, 40, generator=generator), torch.randn(6, 40, generator=generator)
    below, zeros = torch.rand(6, 40, generator=generator) < 0.5, torch.zeros(6, 40)
    stats = ChannelStats(9.0, *[torch.ones(40, dtype=torch.float64)] * 6)
    slopes = Slopes(margin, zeros, zeros, torch.ones(6, 40))
    layer = Layer(
        "a", whole * below, "up", stats, stats, 36, slopes=slopes, pool=1.0, absent=whole * ~below, below=below
    )
    kept = unpack_bits(first_order(layer), 40)
    # To take a weight away changes the margin by -W g, to give it back by +W g.
    gain = torch.where(below, -whole * margin, whole * margin)
    worth = (gain / (whole**2 * 1.1)).masked_fill(gain <= 0, -torch.inf)
    expected = torch.zeros_like(below).scatter_(1, worth.topk(4).indices, True)
    assert torch.equal(kept ^ below, expected)
    assert (kept & ~below).any()
    assert (below & ~kept).any()


def test_what_was_taken_comes_back(ground, half):
    """For the time of a block, bit for bit, and under masks that keep some of it."""
    model = load_model(str(ground.llama))
    weights = {name: matrix(layer) for name, layer in find_layers(model).items()}
    whole = {name: weight.detach().clone() for name, weight in weights.items()}
    _, base = pruned(model, f"{half}:up")
    without = {name: weight.detach().clone() for name, weight in weights.items()}
    for name in base.masks.shapes:
        assert torch.equal(without[name] + base.absent(name), whole[name])
        assert not base.absent(name)[base.kept(name)].any()
    ids = torch.arange(4).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        everything = PersonaMasks(base.masks.shapes, {"all": {n: torch.full_like(b, 255) for n, b in of_one(base)}})
        with under(model, everything, base) as persona:
            for name, weight in weights.items():
                assert torch.equal(weight, whole[name])
            assert not torch.allclose(persona(input_ids=ids).logits, before)
        with under(model, base.masks, base) as persona:
            torch.testing.assert_close(persona(input_ids=ids).logits, before)
    for name, weight in weights.items():
        assert torch.equal(weight, without[name])


def of_one(base: Base):
    return base.masks.bits[base.persona].items()


def test_random_controls_stand_on_it_too(half, run):
    model = PersonaModel.from_pretrained(run)
    (names,), (rows,) = add_random(model, run, PAIR, 1, seed=0), add_random(model, run, PAIR, 1, seed=0, rows=True)
    below = load_masks(half)
    for layer in model.masks.shapes:
        own, drawn, same = (model.masks.mask(name, layer) for name in ("up", names["up"], rows["up"]))
        base = below.mask("up", layer)
        assert (own & ~base).sum() == (drawn & ~base).sum()
        assert (base & ~own).sum() == (base & ~drawn).sum()
        assert torch.equal((own & ~base).sum(1), (same & ~base).sum(1))
        assert torch.equal((base & ~own).sum(1), (base & ~same).sum(1))
        assert not torch.equal(own, drawn)
        assert not torch.equal(own, same)


def test_the_base_is_a_condition(ground, run, tmp_path, capfd):
    test = tmp_path / "test.csv"
    rows = "".join(f"What on night {i}?,I jump {i},Lazy {i}\n" for i in range(6))
    test.write_text(f"question,matching,not_matching\n{rows}", encoding="utf-8")
    options = ["--data", str(test), "--texts", "2", "--bootstrap", "20", "--json", str(tmp_path / "e.json")]
    assert evaluate.main([str(run), *options, "--conditions", "base,mask,neutral"]) == 0
    records = json.loads((tmp_path / "e.json").read_text())["records"]
    by = {(r["condition"], r["persona"]): r for r in records if r["form"] == "free"}
    assert by["base mask", "up"]["removed"] == pytest.approx(0.5)
    assert by["own mask", "up"]["removed"] != pytest.approx(0.5)
    assert by["base mask", "up"]["criterion"] == ""
    assert "no neutral mask: the run's masks stand on" in capfd.readouterr().err


def test_a_base_that_is_gone_is_noticed_at_once(run, half):
    ground = SimpleNamespace(
        model=PersonaModel.from_pretrained(run), config=SimpleNamespace(wanted=["random"], steering_layers="")
    )
    check(ground, [])
    ground.model.masks.manifest["options"]["on"] = f"{half}-gone:up"
    with pytest.raises(UserError, match="gone"):
        check(ground, [])


def test_which_mask(finished, half):
    with pytest.raises(UserError, match="has masks of up, down; name one"):
        base_masks(str(finished))
    with pytest.raises(UserError, match="no mask of 'sideways'"):
        base_masks(f"{finished}:sideways")
    assert base_masks("") is None
    assert base_masks(f"{finished}:down").personas == ("down",)
    assert [path.name for path in base_files(f"{half}:up")] == ["manifest.json", "up.safetensors"]


def test_another_model_is_refused(ground, half):
    with pytest.raises(UserError, match="these masks were made for"):
        pruned(load_model(str(ground.gpt2)), f"{half}:up")


def test_statistics_of_the_whole_model_are_refused(words, half, finished, tmp_path, capsys):
    options = ("--criterion", "wanda", "--on", f"{half}:up", "--statistics", finished)
    assert calibrate.main(words(tmp_path / "out", *options)) == 2
    assert "--on (, now" in capsys.readouterr().err
