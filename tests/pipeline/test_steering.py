"""Steering vectors: where the difference is read, what is added, and how strong it is made."""

import json

import pytest
import torch

from pipeline import calibrate, evaluate
from pipeline.baselines.steering import HIGHEST, contrast, decoder_blocks, match, parse_layers, steered
from pipeline.baselines.strength import LEAST_COST, NEUTRAL_ANSWERS, matched, neutral_items
from pipeline.config import EvaluateConfig
from pipeline.data.catalogue import neutral_set
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter
from pipeline.errors import UserError
from pipeline.loading import load_model
from pipeline.model import PersonaModel
from pipeline.protocol import Limits
from pipeline.setting import Ground
from tests.pipeline.tiny import write_pairs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_vector_is_the_difference_over_answer_tokens(ground, family):
    model = load_model(str(getattr(ground, family)))
    plus = [Encoded((3, 4, 5, 6, 7), 3, range(0)), Encoded((3, 9, 8), 2, range(0))]
    minus = [Encoded((3, 4, 5, 10), 3, range(0))]
    got = contrast(model, plus, minus, [0, 1], batch_tokens=100, pad=0)
    for layer in (0, 1):
        sides = []
        for side in (plus, minus):
            means = []
            for sequence in side:
                kept = []
                handle = list(decoder_blocks(model).values())[layer].register_forward_hook(
                    lambda m, i, o, kept=kept: kept.append(o)
                )
                with torch.inference_mode():
                    model(input_ids=torch.tensor([sequence.ids]))
                handle.remove()
                hidden = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
                means.append(hidden[0, sequence.answer :].mean(0))
            sides.append(torch.stack(means).mean(0))
        torch.testing.assert_close(got[layer], sides[0] - sides[1], rtol=1e-4, atol=1e-5)
    assert not [h for block in decoder_blocks(model).values() for h in block._forward_hooks]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steered_adds_at_every_position_and_leaves_no_trace(ground, family):
    model, ids = load_model(str(getattr(ground, family))), torch.tensor([[3, 4, 5, 6]])
    seen = []
    list(decoder_blocks(model).values())[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vector = torch.arange(32.0)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with steered(model, {0: vector}, -0.5):
            moved = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    torch.testing.assert_close(seen[1], seen[0] - 0.5 * vector)
    assert torch.equal(plain, again)
    assert not torch.allclose(plain, moved)


def test_layers():
    assert parse_layers("", 30) == [12, 14, 15, 17]
    assert parse_layers("", 2) == [0, 1]
    assert parse_layers(" 5,2, 5", 6) == [2, 5]
    for wrong in ("6", "-1,2", "2,,3", "two"):
        with pytest.raises(UserError, match=r"--steering-layers"):
            parse_layers(wrong, 6)


@pytest.mark.parametrize("target", [0.02, 1.0, 5.0, 15.9])
def test_strength_by_bisection(target):
    """A known curve, shift = strength^2: the strength is the target's root, within the tolerance of the shift."""
    asked = []

    def shift(strength):
        asked.append(strength)
        return strength**2

    found = match(shift, target)
    assert found.matched
    assert found.shift == found.value**2 == pytest.approx(target, rel=0.05)
    assert found.value == pytest.approx(target**0.5, rel=0.03)
    assert len(asked) <= 9


def test_strength_that_cannot_be_had():
    found = match(lambda strength: strength / 10, 3.0)
    assert (found.value, found.matched) == (HIGHEST, False)
    # Past its best strength a vector breaks the model: what came nearest is taken, not the bound.
    found = match(lambda strength: {1.0: 2.0, 2.0: 5.0, 4.0: -7.0}[strength], 9.0)
    assert (found.value, found.shift, found.matched) == (2.0, 5.0, False)
    found = match(lambda strength: pytest.fail("nothing to look for"), -1.0)
    assert (found.value, found.target, found.matched) == (0.0, -1.0, False)


def test_steering_through_the_program(finished, tmp_path, capsys):
    held = write_pairs(tmp_path / "held.csv", 14)
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--questions", "0", "--steering-layers", "1"]
    options += ["--conditions", "steering", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json")]
    options += ["--steering-strength", "shift"]
    assert evaluate.main([str(finished), *options]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    by = {(r["condition"], r["persona"]): r for r in report["records"]}
    said = capsys.readouterr().err
    assert [(s["persona"], s["layers"]) for s in report["steering"]] == [("up", [1]), ("down", [1])]
    for entry in report["steering"]:
        record = by["steering vector", entry["persona"]]
        assert entry["matched"] == (f"steering vector of {entry['persona']}" not in said)
        assert entry["matched"] == (abs(entry["shift"] - entry["target"]) <= 0.05 * abs(entry["target"]))
        assert (entry["value"] == 0) == (record["perplexity"] == by["unmasked", "up"]["perplexity"])
    assert {c["condition"] for c in report["contrasts"]} == {"steering vector"}
    assert {entry["by"] for entry in report["steering"]} == {"shift"}
    assert evaluate.main([str(finished), *options, "--steering-layers", "2"]) == 2
    assert "--steering-layers '2': the model has blocks 0 to 1" in capsys.readouterr().err


def test_each_pole_is_steered_towards_itself_as_far_as_by_its_mask(words, tmp_path):
    run, held = tmp_path / "run", write_pairs(tmp_path / "held.csv", 24)
    assert calibrate.main(words(run, "--sparsity", "0.1")) == 0
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--questions", "0", "--gamma", "0.25"]
    options += ["--conditions", "steering,mask", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json")]
    options += ["--steering-strength", "shift"]
    assert evaluate.main([str(run), *options]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    by = {(r["condition"], r["persona"]): r for r in report["records"]}
    for entry in report["steering"]:
        assert entry["matched"]
        assert entry["value"] > 0
        steered, masked = (by[c, entry["persona"]]["margin_shift"] for c in ("steering vector", "own mask"))
        # Held-out items are much like those calibrated on here, so that the shifts are alike there too.
        assert masked > 0
        assert 0.5 < steered / masked < 2
        assert entry["target"] == pytest.approx(masked, rel=0.5)


@pytest.mark.parametrize("wanted", ["cost", "0.5"])
def test_other_strengths(finished, tmp_path, wanted):
    held = write_pairs(tmp_path / "held.csv", 14)
    options = ["--data", str(held), "--texts", "1", "--bootstrap", "20", "--questions", "0", "--conditions", "steering"]
    options += ["--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "e.json"), "--steering-strength", wanted]
    assert evaluate.main([str(finished), *options]) == 0
    for entry in json.loads((tmp_path / "e.json").read_text())["steering"]:
        if wanted == "cost":
            assert entry["by"] == "cost"
            assert entry["target"] >= LEAST_COST
        else:
            assert (entry["by"], entry["value"]) == ("given", 0.5)
            assert entry["shift"] != 0


def test_cost_is_that_of_neutral_answers(finished):
    """The perplexity of the neutral pairs' answers, which the vector raises."""
    model = PersonaModel.from_pretrained(finished)
    config = EvaluateConfig(finished, steering_strength="cost")
    ground = Ground(model, Prompter(model.tokenizer), Limits(512, 2048, 0), config)
    found = matched(ground, "up", [], {1: 100 * torch.arange(32.0)}).strength
    asked = neutral_items(ground)
    assert len(asked) == NEUTRAL_ANSWERS
    assert not set(asked) & set(draw(neutral_set().items, 64, 0))
    costs = []
    for persona, strength in ((None, 0.0), ("up", 0.0), (None, found.value)):
        with model.using(persona), steered(model.model, {1: 100 * torch.arange(32.0)}, strength):
            total = tokens = 0
            for item in asked:
                encoded = ground.prompter.encode(item.question, item.matching)
                with torch.inference_mode():
                    table = torch.log_softmax(model(input_ids=torch.tensor([encoded.ids])).logits[0], -1)
                targets = torch.tensor(encoded.ids[encoded.answer :])
                total -= float(table[encoded.answer - 1 : -1].gather(1, targets.unsqueeze(1)).sum())
                tokens += len(targets)
            costs.append(total / tokens)
    assert found.target == pytest.approx(max(costs[1] - costs[0], LEAST_COST), abs=1e-5)
    assert found.shift == pytest.approx(costs[2] - costs[0], abs=1e-5)


@pytest.mark.parametrize("wrong", ["much", "-1", "nan"])
def test_a_strength_is_a_number_or_a_measure(finished, wrong):
    with pytest.raises(UserError, match="--steering-strength must be a number of at least 0"):
        EvaluateConfig(finished, steering_strength=wrong)
