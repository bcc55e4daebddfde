"""Neutral masks and other personas' masks as conditions, and the order in which conditions are shown."""

import json
import random

import pytest
import torch

from kernels.ops.pack_bits import unpack_bits
from pipeline import calibrate, evaluate
from pipeline.budget import NEUTRAL_TEXTS
from pipeline.conditions import settings
from pipeline.config import CONDITIONS, EvaluateConfig
from pipeline.criteria import least_important
from pipeline.data.catalogue import PersonaSet, neutral_set
from pipeline.data.forms import NEUTRAL
from pipeline.data.module import draw
from pipeline.data.prompts import Prompter
from pipeline.errors import UserError
from pipeline.evaluation import CONDITIONS as SHOWN
from pipeline.evaluation import place
from pipeline.loading import load_model, load_tokenizer
from pipeline.model import PersonaModel
from pipeline.protocol import Limits
from pipeline.setting import Ground
from pipeline.sites import find_linears
from pipeline.store import STATISTICS, load_statistics
from tests.pipeline.tiny import write_pairs

PAIR = PersonaSet("up", "down", (), "test")


def ground_of(run, **options):
    model = PersonaModel.from_pretrained(run)
    limits = Limits(512, 2048, model.tokenizer.pad_token_id)
    return Ground(model, Prompter(model.tokenizer), limits, EvaluateConfig(run, **options))


def test_order_of_conditions():
    shown = [*SHOWN[:-3], "random mask", "random mask 2", *SHOWN[-2:-1], "other mask: a", "other mask: own mask"]
    shuffled = random.Random(1).sample(shown, len(shown))
    assert sorted(shuffled, key=place) == shown
    assert EvaluateConfig("run", conditions="mask, prompt,mask").wanted == ["mask", "prompt"]


def test_neutral_mask_of_wanda_is_wanda_on_neutral_text(words, tmp_path, capsys):
    first, second = tmp_path / "neutral", tmp_path / "wanda"
    common = ("--sparsity", "0.3", "--samples", "8")
    assert calibrate.main(words(first, "--criterion", "neutral", *common)) == 0
    assert calibrate.main(words(second, "--criterion", "wanda", "--statistics", first, *common)) == 0
    wanted, ground = PersonaModel.from_pretrained(first).masks, ground_of(second)
    (setting,) = settings("neutral", ground, PAIR)
    assert (setting.condition, setting.persona) == ("neutral mask", "")
    for layer in wanted.shapes:
        assert torch.equal(ground.model.masks.mask(setting.mask, layer), wanted.mask("up", layer))
    assert settings("neutral", ground_of(first), PAIR) == []
    assert "no neutral mask: the masks of this run are neutral masks themselves" in capsys.readouterr().err


def test_where_there_is_no_neutral_mask(words, finished, tmp_path, capsys):
    assert settings("neutral", ground_of(finished), PAIR) == []
    assert "no statistics of neutral text; calibrate one with --criterion neutral" in capsys.readouterr().err
    for criterion, said in (("contrastive-sparse", "needs an opponent"), ("magnitude", "looks at no data")):
        run = tmp_path / criterion
        assert calibrate.main(words(run, "--criterion", criterion, "--statistics", finished)) == 0
        assert settings("neutral", ground_of(run), PAIR) == []
        assert said in capsys.readouterr().err


def test_neutral_mask_of_first_order_raises_neutral_text_and_stays_in_the_pool(words, tmp_path):
    """Against the gradient by autograd: every weight removed has a positive gain for neutral text."""
    run = tmp_path / "run"
    options = ("--criterion", "first-order-pool", "--sparsity", "0.1", "--pool", "0.4", "--max-length", "60")
    assert calibrate.main(words(run, *options)) == 0
    ground = ground_of(run)
    (setting,) = settings("neutral", ground, PAIR)
    (again,) = settings("neutral", ground, PAIR)
    masks, model, prompter = ground.model.masks, ground.model.model, ground.prompter
    total, tokens = 0, 0
    linears = {name: dict(model.named_modules())[name] for name in masks.shapes}
    for module in linears.values():
        module.weight.requires_grad_(True)
    for item in draw(neutral_set().items, NEUTRAL_TEXTS, 0):
        encoded = prompter.encode(item.question, item.matching)
        if encoded.answer < 60:
            ids = torch.tensor(encoded.ids[:60])
            table = torch.log_softmax(model(input_ids=ids.unsqueeze(0)).logits[0], -1)
            chosen = table[encoded.answer - 1 : len(ids) - 1].gather(1, ids[encoded.answer :].unsqueeze(1))
            total, tokens = total + chosen.sum(), tokens + len(chosen)
    (total / tokens).backward()
    stats = load_statistics(run / STATISTICS)
    site = {linear: site.name for site in stats.sites for linear in site.linears}
    for layer, module in linears.items():
        removed = ~masks.mask(setting.mask, layer)
        assert torch.equal(removed, ~masks.mask(again.mask, layer))
        assert removed.any()
        gain = -(module.weight * module.weight.grad).detach()
        assert (gain[removed] > -1e-7).all()
        own, other = (stats.channels(p, site[layer]) for p in ("up", "down"))
        square = (own.mean_square * own.tokens + other.mean_square * other.tokens) / (own.tokens + other.tokens)
        pool = least_important(module.weight.detach(), square.sqrt().float(), 0.4)
        assert not (removed & ~pool).any()
        # At most a tenth of a row, and as many as the pool has to offer.
        offered = (pool & (gain > 1e-7)).sum(1).clamp(max=removed.shape[1] // 10)
        assert (removed.sum(1) >= offered).all()
        assert (removed.sum(1) <= removed.shape[1] // 10 + 1).all()
        assert torch.equal(masks.mask(setting.mask, layer), unpack_bits(masks.bits[setting.mask][layer], gain.shape[1]))
    assert setting.mask.startswith(NEUTRAL)


def test_other_masks_through_the_program(words, ground, tmp_path, capsys):
    run, held = tmp_path / "run", write_pairs(tmp_path / "held.csv", 14)
    other = write_pairs(tmp_path / "other.csv")
    other.write_text(other.read_text().replace("jump", "drop").replace("fox", "hen"))
    personas = f"up/down={ground.pairs},left/right={other}"
    assert calibrate.main(words(run, "--criterion", "wanda", "--sparsity", "0.3", personas=personas)) == 0
    options = ["--texts", "1", "--bootstrap", "20", "--questions", "0", "--conditions", "others,mask"]
    options += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json")]
    assert evaluate.main([str(run), "--data", f"up/down={held},left/right={held}", *options]) == 0
    assert "other mask: left" in capsys.readouterr().out
    report = json.loads((tmp_path / "e.json").read_text())
    by = {(r["condition"], r["pair"], r["persona"]): r for r in report["records"]}
    contrast = {(c["condition"], c["pair"]): c for c in report["contrasts"]}
    for pair, pole, foreign, counter in (
        ("up/down", "up", "left", "right"),
        ("left/right", "left", "up", "down"),
    ):
        one, two = by[f"other mask: {foreign}", pair, pole], by[f"other mask: {counter}", pair, pole]
        assert one["perplexity"] == by["own mask", f"{foreign}/{counter}", foreign]["perplexity"]
        assert one["criterion"] == "wanda"
        got = contrast[f"other mask: {foreign}", pair]
        assert got["shift"] == pytest.approx(one["margin"] - two["margin"])
        assert (f"other mask: {counter}", pair) not in contrast
    # The same items: up's mask on the pair left/right is up's own state.
    same = by["other mask: up", "left/right", "left"], by["own mask", "up/down", "up"]
    assert same[0]["margin"] == pytest.approx(same[1]["margin"])


def test_masks_of_other_runs(words, ground, tmp_path, capsys):
    """They are the same as those of other personas in one run; a run of another model, or of the same names, is not."""
    held = write_pairs(tmp_path / "held.csv", 14)
    one, two, other = tmp_path / "one,seed=0", tmp_path / "two,seed=0", tmp_path / "other model"
    wanda = "--criterion", "wanda", "--sparsity", "0.3"
    assert calibrate.main(words(one, *wanda, personas=f"up/down={ground.pairs}")) == 0
    assert calibrate.main(words(two, *wanda, personas=f"left/right={ground.pairs}")) == 0
    options = [str(one), "--texts", "1", "--bootstrap", "20", "--questions", "0", "--conditions", "others,mask"]
    options += ["--data", f"up/down={held}", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json")]
    assert evaluate.main([*options, "--other-runs", json.dumps([str(two)])]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["options"]["other_runs"] == [str(two)]
    shift = {c["condition"]: c["shift"] for c in report["contrasts"]}
    # Wanda sees what a persona's answers activate; both runs saw the same.
    assert shift["other mask: left"] == pytest.approx(shift["own mask"])
    assert evaluate.main([*options, "--other-runs+", str(one)]) == 2
    assert "cannot be added (personas in both: down, up)" in capsys.readouterr().err
    model = load_model(str(ground.llama))
    next(iter(find_linears(model).values())).weight.data.neg_()
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(ground.llama)).save_pretrained(tmp_path / "model")
    assert calibrate.main(words(other, *wanda, "--model", str(tmp_path / "model"), personas=f"a/b={ground.pairs}")) == 0
    assert evaluate.main([*options, "--other-runs+", str(other)]) == 2
    assert "was made for other weights" in capsys.readouterr().err
    with pytest.raises(UserError, match="--other-runs is read by --conditions others"):
        EvaluateConfig(one, other_runs=[str(two)])
    with pytest.raises(UserError, match=r"manifest\.json"):
        evaluate.evaluate(EvaluateConfig(one, data=f"up/down={held}", conditions="others", other_runs=[str(tmp_path)]))


def test_what_cannot_be_had_is_said_before_anything_is_measured(words, tmp_path, capsys, monkeypatch):
    pairs, held, run = write_pairs(tmp_path / "pairs.csv"), write_pairs(tmp_path / "held.csv", 14), tmp_path / "run"
    assert calibrate.main(words(run, "--criterion", "wanda", personas=f"up/down={pairs}")) == 0
    monkeypatch.setattr("pipeline.measuring.margins", lambda *a, **o: pytest.fail("measured"))
    options = [str(run), "--data", str(held), "--plot", str(tmp_path / "p.png"), "--conditions"]
    assert evaluate.main([*options, "mask,steering", "--steering-layers", "7"]) == 2
    assert "the model has blocks 0 to 1" in capsys.readouterr().err
    pairs.unlink()
    for name in ("rag", "steering"):
        assert evaluate.main([*options, f"mask,{name}"]) == 2
        assert "pairs.csv: no such file" in capsys.readouterr().err


def test_types_have_every_condition(words, tmp_path):
    """A type's calibration items are those of its four poles, and its masks are composed."""
    run, file = tmp_path / "run", tmp_path / "e.json"
    assert calibrate.main(words(run, "--samples", "3", "--sparsity", "0.1", personas="INTJ,ISFP")) == 0
    options = ["--conditions", ",".join(CONDITIONS), "--pairs", "INTJ", "--samples", "3", "--texts", "1"]
    options += ["--bootstrap", "20", "--plot", str(tmp_path / "p.png"), "--json", str(file), "--no-options"]
    assert evaluate.main([str(run), *options, "--questions", "0", "--max-length", "200"]) == 0
    report = json.loads(file.read_text())
    assert {r["pair"] for r in report["records"]} == {"INTJ/ESFP"}
    conditions = {r["condition"] for r in report["records"]}
    drawn = {"random mask 2", "random in rows", "random in rows 2", "other mask: ISFP", "other mask: ENTJ"}
    assert conditions >= {*SHOWN[:-3], *drawn} - {"base mask"}
    assert "base mask" not in conditions, "the run's masks stand on the whole model"
    assert [s["persona"] for s in report["steering"]] == ["INTJ", "ESFP"]


def test_one_pair_has_no_others(finished, capsys):
    assert settings("others", ground_of(finished), PAIR) == []
    assert "the run has one pair" in capsys.readouterr().err


def test_every_name_has_a_maker():
    from pipeline.conditions import _MAKERS

    assert tuple(_MAKERS) == CONDITIONS
