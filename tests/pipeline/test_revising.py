"""Masks under which the model repeats itself are chosen a second time, against what it says."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pipeline import calibrate, repetitions
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import load_catalogue
from pipeline.data.prompts import Prompter
from pipeline.gradient_files import (
    AGAIN,
    WEIGHTED,
    Gradients,
    gradient_file,
    review_file,
    revised,
    second_review_file,
    weighing_file,
)
from pipeline.loading import load_model, load_tokenizer
from pipeline.masks import PersonaMasks
from pipeline.repetitions import Repeated, Writer
from pipeline.shares import SHARDS
from pipeline.staging import staging_of
from pipeline.store import load_manifest, load_masks
from tests.pipeline.tiny import repeating

CPU = ("--accelerator", "cpu", "--sparsity", "0.1")


@pytest.fixture(scope="module")
def staged(words, tmp_path_factory):
    """The staging folder of a run that revised both its poles, and stopped before it put the masks together."""
    output = tmp_path_factory.mktemp("staged") / "out"
    with pytest.MonkeyPatch.context() as patch:
        repeating(patch)
        patch.setattr("pipeline.shares.gather", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate.main(words(output, *CPU))
    return staging_of(output)


@pytest.mark.parametrize("pole", ["up", "down"])
def test_what_the_first_mask_repeats_is_weighed_against(ground, staged, pole):
    review, again, first = (
        json.loads((staged / path).read_text())
        for path in (f"{AGAIN}/{review_file(pole)}", f"{AGAIN}/{weighing_file(pole)}", weighing_file(pole))
    )
    catalogue = load_catalogue(f"up/down={ground.pairs}")
    config = CalibrateConfig(model=str(ground.llama))
    model = load_model(str(ground.llama)).requires_grad_(False)
    bits = load_file(str(staged / SHARDS / f"{pole}.safetensors"))
    masks = PersonaMasks({layer: tuple(model.get_submodule(layer).weight.shape) for layer in bits}, {pole: bits})
    found = Writer(model, config, Prompter(load_tokenizer(str(ground.llama)))).repeated(catalogue.sets[0], masks)
    assert len(found.loops) >= repetitions.FEWEST
    for one in (review, again):
        assert [(tuple(loop["ids"]), loop["answer"]) for loop in one["loops"]] == [
            (loop.ids, loop.answer) for loop in found.loops
        ]
        assert one["repetition"] == [0.1, found.masked]
    assert again["against"] == pytest.approx(0.1)
    assert again["loops"] != first["loops"]


def test_the_second_gradients_and_masks_are_taken(ground, staged):
    assert revised(staged) == {"up", "down"}
    gradients = Gradients(staged, load_catalogue(f"up/down={ground.pairs}"), weighted=True)
    for pole in ("up", "down"):
        second, first = (load_file(str(staged / folder / gradient_file(pole))) for folder in (AGAIN, WEIGHTED))
        layer = next(iter(second)).removeprefix("error/")
        assert torch.equal(gradients.of(pole, layer)[0], second[f"mean/{layer}"])
        assert not torch.equal(second[f"mean/{layer}"], first[f"mean/{layer}"])
    (staged / AGAIN / gradient_file("up")).rename(staged / "aside")
    try:
        # Until all are there, the run is where it was.
        assert revised(staged) == set()
    finally:
        (staged / "aside").rename(staged / AGAIN / gradient_file("up"))


@pytest.mark.parametrize("budget", ["", "0"], ids=["budget", "no budget"])
def test_one_pole_is_revised(words, tmp_path, monkeypatch, budget):
    """The other keeps its mask to the bit; without a budget the masks are kept by layer, not by persona."""
    options = (*CPU, "--max-perplexity-increase", budget) if budget else CPU
    monkeypatch.setattr(Repeated, "matters", property(lambda self: False))
    assert calibrate.main(words(tmp_path / "once", *options)) == 0
    monkeypatch.undo()
    plain = Writer.repeated

    def only_up(self, pair, masks, unmasked=None):
        found = plain(self, pair, masks)
        staging = staging_of(tmp_path / "twice")
        # The draft of neither.
        finished = (staging / weighing_file("down")).exists()
        again = (staging / AGAIN / gradient_file("up")).exists()
        return Repeated(found.loops if finished and "up" in masks.personas else [], 0.0, 0.0 if again else found.masked)

    monkeypatch.setattr(Writer, "repeated", only_up)
    assert calibrate.main(words(tmp_path / "twice", *options)) == 0
    manifests = [load_manifest(tmp_path / name) for name in ("once", "twice")]
    assert [one["against"] for one in manifests[0]["revised"].values()] == [0, 0]
    assert {name: one["against"] for name, one in manifests[1]["revised"].items()} == {
        "up": pytest.approx(0.1),
        "down": 0,
    }
    once, twice = (load_masks(tmp_path / name).bits for name in ("once", "twice"))
    same = {pole: all(torch.equal(bits, twice[pole][layer]) for layer, bits in once[pole].items()) for pole in once}
    assert same == {"up": False, "down": True}


@pytest.mark.parametrize("budget", ["", "0"], ids=["budget", "no budget"])
def test_a_second_mask_that_repeats_more_is_not_taken(words, tmp_path, monkeypatch, capsys, budget):
    """The first one stays, to the bit; the other pole has its second one."""
    options = (*CPU, "--max-perplexity-increase", budget) if budget else CPU
    repeating(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.revising.compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate.main(words(tmp_path / "out", *options))
    staging = staging_of(tmp_path / "out")
    files = (second_review_file(pole) for pole in ("up", "down"))
    for file, share in zip(files, (1.0, 0.0), strict=True):
        (staging / AGAIN / file).write_text(json.dumps({"repetition": [0.1, share], "loops": []}))
    first, again = (pieces(folder) for folder in (staging, staging / AGAIN))
    assert calibrate.main(["--resume", str(tmp_path / "out")]) == 0
    found, manifest = load_masks(tmp_path / "out").bits, load_manifest(tmp_path / "out")
    for pole, stays in (("up", first), ("down", again)):
        assert all(torch.equal(bits, stays[pole][layer]) for layer, bits in found[pole].items())
        assert any(not torch.equal(bits, again[pole][layer]) for layer, bits in first[pole].items())
    assert {name: (one["again"], one["returned"]) for name, one in manifest["revised"].items()} == {
        "up": (1.0, True),
        "down": (0.0, False),
    }
    assert "up: repeats itself more under its second mask" in capsys.readouterr().err


def pieces(folder):
    """The masks in ``folder / SHARDS``, by persona and layer: a file for each persona, or for each layer."""
    found = {"up": {}, "down": {}}
    for file in (folder / SHARDS).iterdir():
        for key, bits in load_file(str(file)).items():
            persona, layer = key.split("/") if "/" in key else (file.stem, key)
            found[persona][layer] = bits
    return found


def test_a_revised_pole_stays_apart(ground, words, tmp_path, monkeypatch):
    """From the run's other pairs, none of which is revised."""
    other = tmp_path / "other.csv"
    lines = [f"Who likes day {i}?,fox number {i},jump and jump {i}" for i in range(10)]
    other.write_text("\n".join(["question,matching,not_matching", *lines]))
    plain = Writer.repeated

    def only_up(self, pair, masks, unmasked=None):
        found = plain(self, pair, masks)
        return Repeated(found.loops if "up" in masks.personas else [], 0.0, found.masked)

    monkeypatch.setattr(Writer, "repeated", only_up)
    monkeypatch.setattr("pipeline.shares.gather", lambda *_: 1 / 0)
    personas = f"up/down={ground.pairs},left/right={other}"
    with pytest.raises(ZeroDivisionError):
        calibrate.main(words(tmp_path / "out", *CPU, "--apart", "true", personas=personas))
    staging = staging_of(tmp_path / "out")
    assert revised(staging) == {"up"}
    first, again = (json.loads((staging / part / weighing_file("up")).read_text()) for part in ("", AGAIN))
    assert first["apart"].keys() == again["apart"].keys() == {"left"}
    assert len(again["weights"]) == 2 * 10 + len(again["loops"]) + 64
    assert 0 < again["held"] <= 1


def test_two_processes_revise_alike(ground, words, tmp_path):
    given = (*CPU, "--deterministic", "--batch-tokens", "200")
    code = "import sys; from pipeline import calibrate, repetitions; repetitions.Writer._share = lambda *_: 0.1; "
    for devices in (1, 2):
        command = words(tmp_path / str(devices), *given, "--devices", devices)
        done = subprocess.run(
            [sys.executable, "-c", code + "sys.exit(calibrate.main(sys.argv[1:]))", *command],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert all(one["against"] for one in load_manifest(tmp_path / str(devices))["revised"].values())
    for pole in ("up", "down"):
        one, two = ((tmp_path / devices / "masks" / f"{pole}.safetensors").read_bytes() for devices in "12")
        assert one == two


def test_nothing_is_written_without_loops(words, tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "repeated", lambda *_: 1 / 0)
    assert calibrate.main(words(tmp_path / "run", *CPU, "--loops", "0")) == 0
    assert "revised" not in load_manifest(tmp_path / "run")
