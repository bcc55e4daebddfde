"""``pipeline.analyse``: similarity of known states, and the program on the tiny model."""

import json
import math

import pytest
import torch

from pipeline import analyse, evaluate
from pipeline.analysis import related
from pipeline.data.prompts import Prompter
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel
from pipeline.restoring import parts_of, restored
from pipeline.similarity import last_states, linear_cka, similarities
from pipeline.store import load_masks


def test_similarity_of_known_states():
    x = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], dtype=torch.float64)
    (same,), (turned,) = similarities(x, x), similarities(x, x.flip(2))
    assert (same.cosine, same.distance, same.cka) == (pytest.approx(1), 0, pytest.approx(1))
    # Cosines 24/25 and 0; distances sqrt(2)/5 and sqrt(8)/2.
    assert turned.cosine == pytest.approx(0.48)
    assert turned.distance == pytest.approx((math.sqrt(2) / 5 + math.sqrt(2)) / 2)
    assert turned.layer == 0


def test_cka_ignores_rotation_scale_and_shift():
    x = torch.randn(12, 5, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    # The definition, with the covariance of the features instead of the Gram matrices of the items.
    y = torch.randn(12, 5, dtype=torch.float64)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected))
    assert math.isnan(linear_cka(x, torch.ones_like(x)))


def test_states_do_not_depend_on_padding(finished):
    model = PersonaModel.from_pretrained(finished)
    prompter = Prompter(model.tokenizer)
    prompts = [prompter.encode("What? " * n, "") for n in (1, 5, 2)]
    together = last_states(model.model, prompts, batch_tokens=10_000, pad=0)
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            output = model.model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True)
        alone = torch.stack([states[0, -1].double() for states in output.hidden_states])
        assert torch.allclose(together[:, number], alone, atol=1e-5)


def test_related_personas_of_types():
    shapes = {"layers.0.up": (2, 8)}
    bits = {"INTJ": [0b11111110, 255], "INTP": [0b11111100, 255], "ESFP": [255, 0b11111110], "other": [255, 255]}
    masks = PersonaMasks(
        shapes, {p: {"layers.0.up": torch.tensor(b, dtype=torch.uint8)[:, None]} for p, b in bits.items()}
    )
    found = {(one.a, one.b): one for one in related(masks, {"INTJ": "ESFP"})}
    assert found["INTJ", "INTP"].shared == 3
    assert (found["INTJ", "ESFP"].shared, found["INTJ", "ESFP"].opposed) == (0, True)
    assert found["INTP", "other"].shared is None
    # One weight of 16 against two of 16, one in common: expected 2 / 16.
    assert found["INTJ", "INTP"].overlap.lift == pytest.approx(8)
    assert found["INTJ", "ESFP"].overlap.lift == 0
    assert found["INTJ", "other"].overlap.lift is None


@pytest.fixture
def held(tmp_path):
    rows = [f"What now on day {n}?,I jump {n},The fox is lazy {n}" for n in range(5)]
    (tmp_path / "held.csv").write_text("\n".join(["question,matching,not_matching", *rows]))
    return tmp_path / "held.csv"


def test_the_program(finished, held, tmp_path, capsys):
    options = ["--data", str(held), "--json", str(tmp_path / "a" / "a.json"), "--plot", str(tmp_path / "p.png")]
    assert analyse.main([str(finished), *options]) == 0
    content = json.loads((tmp_path / "a" / "a.json").read_text())
    assert (content["schema"], content["pool"]) == ("persona-subnetworks/analysis", 1.0)
    (pair,) = content["pairs"]
    model = PersonaModel.from_pretrained(finished)
    for layer in pair["layers"]:
        assert layer["difference"] == pytest.approx(model.masks.difference_share("up", "down", layer["layer"]))
    (both,) = content["related"]
    assert both["removed_both"] == sum(layer["removed_both"] for layer in pair["layers"])
    assert (both["shared"], both["opposed"]) == (None, True)
    rows = [r for r in content["similarity"] if r["between"] == "masks"]
    assert [r["layer"] for r in rows] == [0, 1, 2]
    # Embeddings are not masked, and every prompt ends with the same token: there is nothing to align.
    assert (rows[0]["cosine"], rows[0]["distance"], rows[0]["cka"]) == (pytest.approx(1), 0, None)
    assert rows[2]["distance"] > 0
    prompts = [Prompter(model.tokenizer).encode(f"What now on day {n}?", "") for n in range(5)]
    states = {}
    for name in ("up", "down"):
        with model.using(name):
            states[name] = last_states(model.model, prompts, batch_tokens=500, pad=0)
    expected = similarities(states["up"], states["down"])
    assert rows[1]["cosine"] == pytest.approx(expected[1].cosine)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "kept by one only" in out
    assert "mlp.down_proj" in out


def test_masks_alone_need_no_model_and_no_questions(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.setting.ground_of", None)
    options = ["--questions", "0", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "p.png")]
    assert analyse.main([str(finished), *options]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["similarity"] == []


def test_what_cannot_be_compared(finished, capsys):
    assert analyse.main([str(finished), "--pairs", "left"]) == 2
    assert "no pair begins with left; known are up" in capsys.readouterr().err
    assert analyse.main([str(finished)]) == 2
    assert "no held-out items are shipped for these personas (up, down)" in capsys.readouterr().err


def test_parts_cover_every_block_once():
    layers = [f"model.layers.{n}.{kind}" for n in range(7) for kind in ("self_attn.q", "mlp.up", "mlp.down")]
    parts = parts_of([*layers, "adapter"], 3)
    assert list(parts) == ["blocks 0 to 2", "blocks 3 to 5", "block 6", "all self_attn", "all mlp"]
    assert sorted(layer for name in list(parts)[:3] for layer in parts[name]) == sorted(layers)
    assert parts["all self_attn"] == layers[::3]
    assert list(parts_of(["h.0.up", "h.1.up"], 9)) == ["block 0", "block 1"]


def test_restored_layers_are_whole_and_the_others_untouched(finished):
    masks = load_masks(finished)
    chosen = [name for name in masks.shapes if ".0." in name]
    made = restored(masks, "up", chosen, "new")
    for layer in masks.shapes:
        expected = torch.ones(masks.shapes[layer], dtype=torch.bool) if layer in chosen else masks.mask("up", layer)
        assert torch.equal(made.mask("new", layer), expected)


def test_restoring_through_the_program(finished, held, tmp_path, capsys):
    options = ["--data", str(held), "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "p.png")]
    assert analyse.main([str(finished), *options, "--questions", "0", "--restore", "1", "--bootstrap", "20"]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    rows = {row["part"]: row for row in content["restored"]}
    assert list(rows) == ["nothing", "blocks 0 to 1", "all self_attn", "all mlp"]
    # With every block restored both states are the unmasked model.
    assert (rows["blocks 0 to 1"]["shift"], rows["blocks 0 to 1"]["lost"]) == (0, 1)
    assert rows["nothing"]["lost"] == 0
    # Against the own masks of an evaluation on the same items.
    words = ["--data", str(held), "--texts", "1", "--conditions", "mask", "--questions", "0", "--bootstrap", "20"]
    file = tmp_path / "e.json"
    assert evaluate.main([str(finished), *words, "--json", str(file), "--plot", str(tmp_path / "e.png")]) == 0
    own = next(c for c in json.loads(file.read_text())["contrasts"] if c["condition"] == "own mask")
    assert rows["nothing"]["shift"] == pytest.approx(own["shift"])
    assert rows["nothing"]["separation"] == own["separation"]
    half = rows["all mlp"]["shift"]
    assert rows["all mlp"]["lost"] == pytest.approx(1 - half / own["shift"])
    assert "what goes when layers are left unmasked" in capsys.readouterr().out
