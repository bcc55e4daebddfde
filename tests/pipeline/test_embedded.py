"""The real model: two processes calibrate it on real personas; the masks load, switch and speak."""

import subprocess
import sys

import pytest

from pipeline.embedded import cache_folder

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(
        not (cache_folder() / "SmolLM2-135M-Instruct" / "config.json").exists(),
        reason="the embedded model is not converted yet (make model)",
    ),
]


def test_calibrate_switch_and_speak(tmp_path):
    words = [sys.executable, "-m", "pipeline.calibrate", "--personas", "judging-perceiving", "--samples", "6"]
    # No search and no drafts: those are tested on tiny models, and by the slow test below.
    words += ["--sparsity", "0.02", "--max-perplexity-increase", "0", "--loops", "0"]
    words += ["--devices", "2", "--accelerator", "cpu"]
    words += ["--output", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "210 linear layers read 120 distinct inputs" in done.stderr

    from pipeline.data.catalogue import shipped_set
    from pipeline.data.prompts import Prompter
    from pipeline.generation import answer
    from pipeline.model import PersonaModel
    from pipeline.protocol import FREE, Limits, margins
    from pipeline.store import load_masks

    assert load_masks(tmp_path / "run").manifest["counts"]["personas"]["judging"][0] == 6
    model = PersonaModel.from_pretrained(tmp_path / "run")
    prompter = Prompter(model.tokenizer)
    items = shipped_set("judging-perceiving").split("test")[:6]
    mean = {}
    for persona in ("judging", None, "perceiving"):
        model.switch(persona)
        values = margins(model.model, prompter, items, FREE, system=None, limits=Limits(512, 2048, 0)).normalised
        mean[persona] = sum(values) / len(values)
    assert mean["judging"] > mean["perceiving"]
    texts = {p: answer(model.switch(p), prompter, "How do you plan a holiday?", max_new_tokens=12) for p in mean}
    assert all(texts.values())
    assert texts["judging"] != texts["perceiving"]


@pytest.mark.slow
def test_default_criterion_separates_on_held_out_topics(tmp_path):
    """The claim of the README, small: separation beyond its interval on items from topics never calibrated on."""
    import json

    from pipeline import calibrate, evaluate

    run = str(tmp_path / "run")
    assert calibrate.main(["--personas", "judging-perceiving", "--samples", "48", "--output", run]) == 0
    options = ["--no-options", "--conditions", "mask", "--texts", "4", "--questions", "0"]
    assert evaluate.main([run, *options, "--json", str(tmp_path / "e.json")]) == 0
    contrasts = {c["condition"]: c for c in json.loads((tmp_path / "e.json").read_text())["contrasts"]}
    assert contrasts["own mask"]["separation_low"] > 0
    assert contrasts["own mask"]["shift_low"] > 0
