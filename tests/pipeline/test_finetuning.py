"""Fine-tuning as a condition: what is learnt, that it is learnt from the own answers, and that no trace is left."""

import json
import sys

import pytest
import torch

from pipeline import evaluate
from pipeline.baselines.finetuning import adapted, fine_tune
from pipeline.data.prompts import Encoded
from pipeline.errors import UserError
from pipeline.likelihood import answer_scores
from pipeline.loading import load_model
from pipeline.model import PersonaModel
from tests.pipeline.tiny import write_pairs

pytest.importorskip("peft")

ANSWERS = [Encoded((3, 4, 5 + n, 20, 21, 22), 3, range(0)) for n in range(12)]
OPTIONS = {"rank": 4, "rate": 5e-3, "seed": 0, "batch_tokens": 40, "pad": 0}


def nats(model, answers=ANSWERS):
    return -sum(s.mean for s in answer_scores(model, answers, batch_tokens=1000, pad=0)) / len(answers)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_those_that_were_trained(ground, words, finished, tmp_path, family):
    from pipeline import calibrate

    run = finished
    if family == "gpt2":
        run = tmp_path / "run"
        assert calibrate.main(words(run, "--criterion", "magnitude", model=ground.gpt2)) == 0
    model = PersonaModel.from_pretrained(run)
    layers = list(model.masks.shapes)
    before = {name: model.weight(name).clone() for name in layers}
    plain, trained = nats(model.model), load_model(str(getattr(ground, family)))
    adapter = fine_tune(trained, ANSWERS, layers, epochs=6, **OPTIONS)
    assert len(adapter.losses) == 6
    assert adapter.losses[0] == pytest.approx(plain, rel=0.2)
    assert adapter.losses[-1] < adapter.losses[0] - 0.4
    with adapted(model, adapter):
        # The trained copy still holds its adapters beside its weights.
        assert nats(model.model) == pytest.approx(nats(trained), rel=1e-3)
        assert nats(model.model) < adapter.losses[-1] + 0.1
    assert all(torch.equal(model.weight(name), before[name]) for name in layers)
    assert adapter.bytes == 4 * 4 * sum(sum(shape) for shape in model.masks.shapes.values())


def test_same_seed_same_adapter(ground, finished):
    layers = list(PersonaModel.from_pretrained(finished).masks.shapes)

    def made(seed):
        adapter = fine_tune(load_model(str(ground.llama)), ANSWERS, layers, epochs=1, **(OPTIONS | {"seed": seed}))
        return torch.cat([t.flatten() for pair in adapter.factors.values() for t in pair])

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


def test_the_condition(finished, tmp_path):
    """Each pole is trained on its own answers, which become likelier in items alike."""
    written, data = tmp_path / "out.json", tmp_path / "held.csv"
    write_pairs(data, 16)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], *lines[11:]]) + "\n")
    options = ("--conditions", "lora,mask", "--data", f"up/down={data}", "--no-options", "--lora-rate", "0.01")
    common = ("--json", written, "--plot", tmp_path / "plot.png", "--bootstrap", "20", "--efficiency", "--texts", "2")
    assert evaluate.main([str(finished), *map(str, (*options, *common))]) == 0
    content = json.loads(written.read_text())
    tuned = {r["persona"]: r for r in content["records"] if r["condition"] == "fine-tuned"}
    plain = {r["persona"]: r for r in content["records"] if r["condition"] == "unmasked"}
    assert set(tuned) == {"up", "down"}
    assert all(tuned[pole]["perplexity"] != plain[pole]["perplexity"] for pole in tuned)
    assert all(tuned[pole]["own_answer"] > plain[pole]["own_answer"] + 0.1 for pole in tuned)
    (cost, _) = (e for e in content["efficiency"] if e["condition"] == "fine-tuned")
    assert cost["disk_bytes"] == cost["memory_bytes"] > 0
    assert cost["working_bytes"] > cost["memory_bytes"]
    assert {e["condition"] for e in content["generation"]} == {"unmasked", "fine-tuned", "own mask"}


def test_without_peft_it_says_what_to_install(ground, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="persona-subnetworks.lora"):
        fine_tune(load_model(str(ground.llama)), ANSWERS, ["x"], epochs=1, **OPTIONS)


def test_an_answer_that_was_cut_away_is_an_error(ground):
    cut = [*ANSWERS, Encoded((3, 4), 2, range(0))]
    with pytest.raises(UserError, match="--max-length"):
        fine_tune(load_model(str(ground.llama)), cut, ["x"], epochs=1, **OPTIONS)
