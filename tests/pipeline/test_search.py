"""A search that remembers what it chooses among finds the masks that one without memory finds."""

import json

import pytest
import torch

from pipeline import building, calibrate
from pipeline.store import load_masks
from tests.pipeline.test_leaning import write_statements


@pytest.mark.parametrize("kept", [0, 20_000], ids=["nothing", "some layers"])
@pytest.mark.parametrize("kind", ["statements", "pairs", "on"])
def test_the_same_masks_without_memory(ground, words, tmp_path, monkeypatch, kind, kept):
    options = ["--sparsity", "0.2", "--pool", "1", "--evidence", "0.5", "--loops", "0", "--skip-blocks", "0"]
    options += ["--max-perplexity-increase", "0.5"]
    personas = f"up/down={write_statements(tmp_path / 'up.jsonl') if kind == 'statements' else ground.pairs}"
    if kind == "on":
        below = words(tmp_path / "below", "--criterion", "neutral", "--sparsity", "0.3", personas=personas)
        assert calibrate.main(below) == 0
        options += ["--on", f"{tmp_path / 'below'}:up"]
    counts, real = [], building.choice

    def counted(layer):
        counts.append(layer.name)
        return real(layer)

    found = {}
    for limit in (building.KNOWN_BYTES, kept):
        monkeypatch.setattr(building, "KNOWN_BYTES", limit)
        monkeypatch.setattr(building, "choice", counted)
        counts.clear()
        assert calibrate.main(words(tmp_path / str(limit), *options, personas=personas)) == 0
        found[limit] = load_masks(tmp_path / str(limit)), list(counts)
    (whole, remembered), (other, few) = found.values()
    # Once for each of the two poles.
    assert len(remembered) == 2 * len(whole.shapes)
    assert len(few) < len(remembered)
    assert bool(few) == bool(kept)
    for pole in ("up", "down"):
        assert all(torch.equal(whole.bits[pole][name], other.bits[pole][name]) for name in whole.shapes)
    described = [json.loads((tmp_path / str(limit) / "manifest.json").read_text())["sparsity"] for limit in found]
    assert described[0] == described[1]
    assert 0 < whole.density("up") < 1
