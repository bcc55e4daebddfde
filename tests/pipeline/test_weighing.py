"""Drafts, what is repeated under them, and every pole's weights of the answers."""

import contextlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import calibrate, drafts, repetitions, weighing
from pipeline.calibration import run_pass
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import load_catalogue
from pipeline.data.forms import NEUTRAL
from pipeline.data.prompts import Encoded, Prompter
from pipeline.gradient_files import WEIGHTED, Gradients, gradient_file, weighing_file
from pipeline.gradients import SCALE, GradientModule, ObjectiveData
from pipeline.loading import load_model, load_tokenizer
from pipeline.loops import LONGEST, loop_of
from pipeline.objectives import likelihood_units, margin_units
from pipeline.packing import common
from pipeline.sites import maskable
from pipeline.sketching import SKETCHES, Coordinates, SketchedGradients, sketch_file, sketching
from pipeline.staging import staging_of
from pipeline.store import load_manifest
from pipeline.textual import repetition
from pipeline.weighing import poles_of, weighted
from pipeline.whitening import contrast_weights, standardised
from tests.pipeline.test_whitening import answers
from tests.pipeline.tiny import repeating


@pytest.mark.parametrize(
    ("written", "context"),
    [
        ([], None),
        ([1, 2], None),
        ([1, 2, 3, 4, 5, 1, 2, 4], None),
        ([7, 1, 2, 3, 4, 1, 2, 3, 9, 9], 7),
        ([5, 5, 5, 5, 5], 3),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 5),
    ],
)
def test_the_first_repetition(written, context):
    found = loop_of([8, 9], written)
    if context is None:
        assert found is None
    else:
        assert found == Encoded((8, 9, *written), 2 + context, range(0))


def test_a_repetition_is_cut():
    found = loop_of([8], [1, 2, 3] * 20)
    assert len(found) == 1 + 5 + LONGEST
    assert found.answer == 6
    assert found.ids[6:] == tuple(([3] + [1, 2, 3] * 20)[:LONGEST])


BROKEN, PHRASES, NONE = [7] * 40, [*range(12), *range(12)], list(range(30))


@pytest.mark.parametrize(
    ("writes", "taken", "tried"),
    [
        ([PHRASES, BROKEN], PHRASES, 1),
        ([BROKEN, PHRASES, NONE], PHRASES, 2),
        ([BROKEN, BROKEN, PHRASES], PHRASES, 3),
        ([BROKEN, NONE, PHRASES], BROKEN, 2),
        ([BROKEN, BROKEN], BROKEN, 2),
        ([NONE, PHRASES], None, 1),
    ],
)
def test_a_broken_draft_is_followed_by_a_smaller_one(monkeypatch, writes, taken, tried):
    """The text is the smaller draft's, how much it is turned away from the first one's."""
    seen, prompts = [], [[1, 2]] * repetitions.FEWEST

    def continued(self, model, prompts):
        seen.append(model)
        return [model] * len(prompts)

    monkeypatch.setattr(repetitions, "under", lambda model, masks, base: contextlib.nullcontext(masks))
    monkeypatch.setattr(repetitions.Writer, "_prompts", lambda *_: prompts)
    monkeypatch.setattr(repetitions.Writer, "_share", lambda *_: 0.1)
    monkeypatch.setattr(repetitions.Writer, "_continued", continued)
    monkeypatch.setattr(drafts.Drafts, "_drafts", lambda *_: iter(writes))
    some = drafts.Drafts(None, None, None, None, None, (), torch.device("cpu"))
    found = some.repeated(None, "up")
    assert seen == writes[:tried]
    assert found.loops == ([loop_of(prompt, taken) for prompt in prompts] if taken else [])
    assert found.masked == repetition(writes[0])
    assert found.excess == (repetition(writes[0]) - 0.1 if taken else 0)


@pytest.fixture
def objectives():
    encoded = [one.encoded for one in answers(9)]
    return {
        "up": margin_units(encoded[:3], encoded[3:6]),
        "alone": likelihood_units(encoded[:2]),
        NEUTRAL: likelihood_units(encoded[6:]),
    }


def config_of(ground, tmp_path, **more):
    return CalibrateConfig(model=str(ground.llama), output=tmp_path / "run", accelerator="cpu", devices="1", **more)


def test_one_pass_for_gradients_and_sketches(ground, tmp_path, objectives):
    """The gradients are those of the pass without sketches, the sketches those of every answer alone."""
    config = config_of(ground, tmp_path)
    for name, kind in (("plain", GradientModule), ("sketched", SketchedGradients)):
        (tmp_path / name).mkdir()
        run_pass(config, kind(config, tmp_path / name, 0, objectives), ObjectiveData(objectives, 40), inference=False)
    for name in objectives:
        plain, sketched = (load_file(str(tmp_path / f / gradient_file(name))) for f in ("plain", "sketched"))
        assert plain.keys() == sketched.keys()
        for key, value in plain.items():
            assert torch.allclose(sketched[key], value, rtol=1e-4, atol=1e-6 + 1e-5 * float(value.abs().max())), key
    assert not (tmp_path / "sketched" / sketch_file("alone")).exists()
    model = load_model(str(ground.llama)).requires_grad_(False)
    linears = maskable(model, config)
    for name in ("up", NEUTRAL):
        rows = load_file(str(tmp_path / "sketched" / sketch_file(name)))[SKETCHES]
        alone = [answer.encoded for column in zip(*objectives[name], strict=True) for answer in column]
        assert len(rows) == len(alone)
        for row, text in zip(rows, alone, strict=True):
            with sketching(linears, Coordinates(linears, config.seed), 0) as sketcher:
                (expected,) = sketcher.sketch(model, [weighing._mean(text)], 0) / SCALE
            assert torch.allclose(row, expected, rtol=1e-3, atol=1e-6 + 1e-4 * float(expected.abs().max()))


def test_objectives_take_the_weights(ground, tmp_path, objectives):
    catalogue = load_catalogue(f"up/down={ground.pairs}")
    both = poles_of(catalogue, objectives, config_of(ground, tmp_path))
    assert [pole.name for pole in both] == ["up", "down"]
    assert [pole.name for pole in poles_of(catalogue, objectives, config_of(ground, tmp_path, loops=0.0))] == ["up"]
    loop = Encoded((5, 6, 7, 8), 2, range(0))
    given = {"up": [0.5, 0.25, 0.25, -0.5, -0.25, -0.25, -0.15, 0.1, -0.2, 0.3], "down": [0.1] * 9}
    for name, weights in given.items():
        loops = [{"ids": list(loop.ids), "answer": loop.answer}] if name == "up" else []
        (tmp_path / weighing_file(name)).write_text(json.dumps({"weights": weights, "loops": loops}))
    found = weighted(both, objectives[NEUTRAL], tmp_path)
    sums = [[round(one.weight * one.tokens, 6) for one in unit] for unit in found["up"]]
    assert sums == [[0.5, -0.5], [0.25, -0.25], [0.25, -0.25], [-0.15], [0.1], [-0.2], [0.3]]
    assert found["up"][3][0].encoded == loop
    first, second = objectives["up"][0]
    assert [one.encoded for one in found["up"][0]] == [first.encoded, second.encoded]
    assert [one.encoded for one in found["down"][0]] == [second.encoded, first.encoded]
    assert len(found["down"]) == 6
    given = json.loads((tmp_path / weighing_file("down")).read_text())
    (tmp_path / weighing_file("up")).write_text(json.dumps(given))
    assert list(weighted(both, objectives[NEUTRAL], tmp_path)) == ["up"]


def test_a_second_pole_without_a_gradient_of_its_own(ground, tmp_path):
    """It has the first's with the other sign."""
    catalogue = load_catalogue(f"up/down={ground.pairs}")
    (tmp_path / WEIGHTED).mkdir()
    values = {"up": torch.tensor([[1.0, -2.0]]), "down": torch.tensor([[4.0, 5.0]])}
    for name, value in values.items():
        tensors = {"mean/layer": value, "error/layer": value.abs()}
        save_file(tensors, tmp_path / WEIGHTED / gradient_file(name), {"answers": "4", "square": "0.5"})
        (tmp_path / weighing_file(name)).write_text(json.dumps({"apart": {}}))
        found = Gradients(tmp_path, catalogue, weighted=True)
        mean, error = found.of("down", "layer")
        assert torch.equal(mean, -values["up"] if name == "up" else value)
        assert torch.equal(error, value.abs())
        assert torch.equal(found.of("up", "layer")[0], values["up"])


def test_a_pole_apart_from_another_pair(ground, tmp_path):
    """Its gradient takes the other pair's margin along, that of a shared direction with its sign; what the answers
    vary by is the pole's own. A mixture has its parts'."""
    catalogue = load_catalogue(f"up/down={ground.pairs},left/right={ground.pairs}", compose="both=0.5*down+1.5*left")
    (tmp_path / WEIGHTED).mkdir()
    plain = {"up": torch.tensor([[1.0, -2.0]]), "left": torch.tensor([[4.0, 8.0]])}
    for folder, factor in ((tmp_path, 1.0), (tmp_path / WEIGHTED, 10.0)):
        for name, value in {**plain, NEUTRAL: torch.ones(1, 2)}.items():
            tensors = {"mean/layer": factor * value, "error/layer": factor * value.abs()}
            save_file(tensors, folder / gradient_file(name), {"answers": "4", "square": "0.5"})
    (tmp_path / weighing_file("up")).write_text(json.dumps({"apart": {"left": 0.5}}))
    (tmp_path / weighing_file("left")).write_text(json.dumps({"apart": {"up": -2.0}}))
    found = Gradients(tmp_path, catalogue, weighted=True)
    up = 10 * plain["up"] + 0.5 * plain["left"]
    left = 10 * plain["left"] - 2 * plain["up"]
    for name, value in {"up": up, "down": -up, "left": left, "both": (0.5 * -up + 1.5 * left) / 2}.items():
        assert torch.allclose(found.of(name, "layer")[0], value), name
    error = ((10 * plain["up"]).square() + (0.5 * plain["left"]).square()).sqrt()
    assert torch.allclose(found.of("down", "layer")[1], error)
    expected = ((10 * plain["up"]).square() + 1) * 4 / 0.5 / 8
    assert torch.allclose(found.variance("up", "layer"), expected)
    assert torch.equal(Gradients(tmp_path, catalogue).of("up", "layer")[0], plain["up"])


@pytest.fixture(scope="module")
def kept(words, tmp_path_factory):
    """The staging folder of a run that was stopped before it built masks."""
    output = tmp_path_factory.mktemp("kept") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_build", lambda *_, **__: 1 / 0)
        repeating(patch)
        with pytest.raises(ZeroDivisionError):
            calibrate.main(words(output, "--accelerator", "cpu"))
    return staging_of(output)


@pytest.mark.parametrize("pole", ["up", "down"])
def test_every_pole_is_weighed_against_what_it_repeats(ground, kept, pole):
    found = json.loads((kept / weighing_file(pole)).read_text())
    assert len(found["loops"]) >= repetitions.FEWEST
    before, after = found["repetition"]
    assert found["against"] == pytest.approx(0.2 * (after - before))
    config = CalibrateConfig(model=str(ground.llama))
    up = load_file(str(kept / sketch_file("up")))[SKETCHES].chunk(2)
    own, other = up if pole == "up" else up[::-1]
    model = load_model(str(ground.llama)).requires_grad_(False)
    linears = maskable(model, config)
    prompter = Prompter(load_tokenizer(str(ground.llama)))
    # The template's first tokens, which are left out.
    beginning = common(
        [prompter.ids(prompter.prompt(question)) for question in ("What do you do?", "I like dogs.")], 99
    )
    assert beginning > 3
    rows = []
    for one in found["loops"]:
        loop = Encoded(tuple(one["ids"]), one["answer"], range(0))
        with sketching(linears, Coordinates(linears, config.seed), beginning) as sketcher:
            rows.append(sketcher.sketch(model, [weighing._mean(loop)], 0)[0])
    neutral = load_file(str(kept / sketch_file(NEUTRAL)))[SKETCHES]
    every = standardised(own, other, torch.stack(rows) / SCALE, neutral)
    expected = contrast_weights(every @ every.T / every.shape[1], len(own), len(rows), against=found["against"])
    assert torch.allclose(torch.tensor(found["weights"], dtype=torch.float64), expected, atol=1e-4)
    with safe_open(str(kept / WEIGHTED / gradient_file(pole)), "pt") as file:
        assert int(file.metadata()["answers"]) == 2 * len(own) + len(rows) + len(neutral)


def test_a_run_keeps_its_pairs_apart(ground, words, tmp_path, capsys):
    """Two pairs that differ, and one of them twice, of which little is left."""
    other = tmp_path / "other.csv"
    lines = [f"Who likes day {i}?,fox number {i},jump and jump {i}" for i in range(10)]
    other.write_text("\n".join(["question,matching,not_matching", *lines]))
    personas = f"up/down={ground.pairs},left/right={other}"
    options = ("--apart", "true", "--loops", "0", "--max-perplexity-increase", "0", "--accelerator", "cpu")
    assert calibrate.main(words(tmp_path / "run", *options, personas=personas)) == 0
    manifest = load_manifest(tmp_path / "run")
    assert {name: list(one["apart"]) for name, one in manifest["apart"].items()} == {"up": ["left"], "left": ["up"]}
    assert all(0 < one["held"] <= 1 for one in manifest["apart"].values())
    said = capsys.readouterr().err
    assert "up: keeps" in said
    assert "the same persona?" not in said
    assert "--apart without a budget: only the directions" in said
    twice = f"up/down={ground.pairs},again/back={ground.pairs}"
    assert calibrate.main(words(tmp_path / "twice", *options, personas=twice)) == 0
    same = load_manifest(tmp_path / "twice")["apart"]["up"]["held"]
    assert same < weighing.MUCH_THE_SAME < manifest["apart"]["up"]["held"]
    assert "up: keeps" in (said := capsys.readouterr().err)
    assert "apart from again; is one of them the same persona?" in said


def test_one_pair_has_nothing_to_be_apart_from(words, tmp_path, capsys):
    assert calibrate.main(words(tmp_path / "run", "--apart", "true")) == 2
    assert "--apart keeps pairs apart from each other" in capsys.readouterr().err
