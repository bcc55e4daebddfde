"""The questionnaire: signs and summaries of known margins, and the program on the tiny model."""

import json

import pytest
import torch

from pipeline import questionnaire
from pipeline.data.catalogue import DICHOTOMIES, TYPES
from pipeline.data.prompts import Prompter
from pipeline.data.questionnaire import questionnaire as shipped
from pipeline.mbti import lean_of, signs_of, signs_right, spelled, summary_of
from pipeline.model import PersonaModel
from pipeline.profiles import SPOKES, margins_of
from pipeline.protocol import FREE, Margins

IE, NS, FT, JP = DICHOTOMIES


def known(*values):
    return Margins(FREE, [8 * v for v in values], list(values), [0.0] * len(values), [0.0] * len(values), [])


def lean(persona, dichotomy, now, base):
    return lean_of(persona, dichotomy, known(*now), known(*base), resamples=50, seed=0)


def test_what_a_persona_should_be():
    assert signs_of("INTJ") == {IE: 1, NS: 1, FT: -1, JP: 1}
    assert signs_of("ESFP") == {IE: -1, NS: -1, FT: 1, JP: -1}
    assert signs_of("thinking") == {FT: -1}
    assert signs_of("pirate") == {}
    assert spelled({IE: -1.0, NS: 2.0, FT: 0.0}) == "ENx?"
    assert {spelled(signs_of(name)) for name in TYPES} == set(TYPES)


def test_a_lean_of_known_margins():
    got = lean(None, IE, (1.0, -2.0, 4.0), (0.5, -2.0, 0.0))
    assert (got.n, got.margin, got.shift) == (3, 1.0, 1.5)
    assert got.share == pytest.approx(2 / 3)
    assert -2 <= got.low <= 1 <= got.high <= 4
    assert 0 <= got.shift_low <= 1.5 <= got.shift_high <= 4


def test_signs_from_zero_and_from_the_unmasked_model_differ():
    """A base model that leans to I, N, F and J: a mask that moves it towards ESTP need not arrive."""
    base = dict.fromkeys(DICHOTOMIES, (1.0, 1.0))
    moved = {IE: (0.5, 0.5), NS: (-1.0, -1.0), FT: (2.0, 2.0), JP: (1.0, 1.0)}
    leans = [lean("ESTP", name, moved[name], base[name]) for name in DICHOTOMIES]
    leans += [lean(None, name, base[name], base[name]) for name in DICHOTOMIES]
    one = signs_right("ESTP", FREE, leans)
    # I-E moved the right way but not past zero, N-S past it, F-T the wrong way, J-P not at all.
    assert (one.spelled, one.expected, one.right_zero, one.right_unmasked) == ("ISFJ", 4, 1, 2)
    unmasked = signs_right(None, FREE, leans)
    assert (unmasked.spelled, unmasked.expected, unmasked.right_zero) == ("INFJ", 0, 0)
    right = [lean("INFJ", name, (2.0, 2.0), (1.0, 1.0)) for name in DICHOTOMIES]
    pole = [lean("sensing", NS, (-1.0, -1.0), (1.0, 1.0))]
    signs = [one, signs_right("INFJ", FREE, right), unmasked, signs_right("sensing", FREE, pole)]
    assert (signs[3].expected, signs[3].right_zero, signs[3].right_unmasked) == (1, 1, 1)
    got = summary_of(FREE, signs)
    assert (got.types, got.all_right_zero, got.all_right_unmasked) == (2, 1, 1)
    assert (got.signs, got.signs_right_zero, got.signs_right_unmasked) == (8, 5, 6)
    assert margins_of(leans, "ESTP", FREE)["extravert"] == -0.5
    assert [SPOKES.index(b) - SPOKES.index(a) for a, b in (n.split("-") for n in DICHOTOMIES)] == [4] * 4


@pytest.fixture(scope="module")
def typed(ground, words):
    from pipeline import calibrate

    folder = ground.folder / "typed"
    options = ("--criterion", "wanda", "--sparsity", "0.5", "--samples", "6")
    assert calibrate.main(words(folder, *options, personas="INTJ")) == 0
    return folder


def mean_by_hand(model, prompter, question, answer):
    encoded = prompter.encode(question, answer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].double().log_softmax(-1)
    places = range(encoded.answer, len(encoded))
    return sum(logits[t - 1, encoded.ids[t]].item() for t in places) / len(places)


def test_the_program_against_a_loop(typed, tmp_path, capsys):
    assert questionnaire.main([str(typed), "--bootstrap", "20", "--json", str(tmp_path / "new" / "q.json")]) == 0
    report = json.loads((tmp_path / "new" / "q.json").read_text())
    assert (report["schema"], report["version"]) == ("persona-subnetworks/questionnaire", 1)
    by = {(r["persona"], r["form"], r["dichotomy"]): r for r in report["records"]}
    assert len(by) == 3 * 2 * 4
    assert all(r["n"] == 8 for r in by.values())
    model = PersonaModel.from_pretrained(typed)
    prompter = Prompter(model.tokenizer)
    (thinking,) = (s for s in shipped() if s.plus == "feeling")
    values = {}
    for name in (None, "INTJ"):
        with model.using(name):
            pairs = [(i.question, i.matching, i.other) for i in thinking.items]
            each = [mean_by_hand(model, prompter, q, a) - mean_by_hand(model, prompter, q, b) for q, a, b in pairs]
            values[name] = sum(each) / 8
    assert by["INTJ", FREE, FT]["margin"] == pytest.approx(values["INTJ"], abs=1e-5)
    assert by["INTJ", FREE, FT]["shift"] == pytest.approx(values["INTJ"] - values[None], abs=1e-5)
    assert by[None, FREE, FT]["shift"] == 0
    signs = {(s["persona"], s["form"]): s for s in report["signs"]}
    wanted = {IE: 1, NS: 1, FT: -1, JP: 1}
    right = sum(sign * by["INTJ", "options", name]["margin"] > 0 for name, sign in wanted.items())
    assert signs["INTJ", "options"]["right_zero"] == right
    assert [s["types"] for s in report["summary"]] == [2, 2]
    for name in ("radar", "heat"):
        assert (typed / f"questionnaire-{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "of 2 types" in capsys.readouterr().out


def test_a_run_without_types(finished, capsys):
    assert questionnaire.main([str(finished)]) == 2
    assert "no mask of a type or pole there, only of up, down" in capsys.readouterr().err


def test_plots_that_cannot_be_written(typed, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = ["--samples", "1", "--bootstrap", "5", "--radar", str(tmp_path / "file" / "r.png")]
    assert questionnaire.main([str(typed), *options]) == 2
    assert "could not write" in capsys.readouterr().err
