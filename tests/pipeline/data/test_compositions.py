"""--compose: mixtures of measured personas, their opposites, and what is refused."""

import pytest

from pipeline.data.catalogue import load_catalogue, persona_prompt
from pipeline.errors import UserError

PLAIN = [{"question": f"Q{i}?", "answer": f"a{i}"} for i in range(3)]


def compose(formula, personas="dichotomies"):
    catalogue = load_catalogue(personas, compose=formula)
    return catalogue, {c.name: c.parts for c in catalogue.compositions}


def test_mixture_and_its_opposite():
    catalogue, mixtures = compose("mine/theirs=0.7*introvert+0.3*thinking")
    assert mixtures == {
        "mine": (("introvert", 0.7), ("thinking", 0.3)),
        "theirs": (("extravert", 0.7), ("feeling", 0.3)),
    }
    assert catalogue.personas == ["mine", "theirs"]
    assert (catalogue.opponents["mine"], catalogue.opponents["theirs"]) == ("theirs", "mine")


def test_weight_one_and_blanks_and_the_default_opposite():
    _, mixtures = compose(" mine = introvert + 2*thinking ")
    assert mixtures["mine"] == (("introvert", 1.0), ("thinking", 2.0))
    assert mixtures["not-mine"] == (("extravert", 1.0), ("feeling", 2.0))


def test_several_mixtures_beside_types():
    catalogue, _ = compose("a=introvert,b=0.5*sensing+0.5*feeling", "INTJ")
    assert catalogue.personas == ["INTJ", "ESFP", "a", "not-a", "b", "not-b"]


def test_a_part_without_opposite_gives_a_mixture_without_opposite(write):
    catalogue, mixtures = compose("mix=0.5*dogs+0.5*introvert", f"dichotomies,{write('dogs.jsonl', PLAIN)}")
    assert list(mixtures) == ["mix"]
    assert "mix" not in catalogue.opponents


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("mine", "expected NAME"),
        ("mine=0.7*nobody", "unknown persona 'nobody'; known are introvert, extravert"),
        ("mine=", "unknown persona ''"),
        ("mine=introvert+", "unknown persona ''"),
        ("mine=x*introvert", "'x' is not a number"),
        ("mine=*introvert", "not a number"),
        ("mine=0*introvert", "positive"),
        ("mine=-1*introvert", "positive"),
        ("mine=nan*introvert", "positive"),
        ("mine=inf*introvert", "positive"),
        ("a b=introvert", "persona name"),
        ("../x=introvert", "persona name"),
        ("=introvert", "persona name"),
        ("a=introvert,a=thinking", "'a' is taken"),
        ("a=introvert,b/a=thinking", "'a' is taken"),
        ("introvert=thinking", "'introvert' is taken"),
        ("a/extravert=thinking", "'extravert' is taken"),
    ],
)
def test_refused_formulas_are_quoted(formula, words):
    with pytest.raises(UserError, match=words):
        compose(formula)


def test_mixture_named_as_its_own_opposite():
    with pytest.raises(UserError):
        compose("same/same=introvert")


def test_mixture_named_like_a_type():
    with pytest.raises(UserError, match="'ENFP' is taken"):
        compose("ENFP=introvert", "types")


def test_prompts_in_words_speak_of_the_persona():
    assert "introvert" in persona_prompt("introvert")
    poles = ("introvert", "intuitive", "thinking", "judging")
    assert persona_prompt("INTJ") == " ".join(persona_prompt(pole) for pole in poles)
    assert "'pirate'" in persona_prompt("pirate")
    assert "opposite of the persona 'pirate'" in persona_prompt("not-pirate")
    assert len({persona_prompt(p) for p in ("introvert", "extravert", "feeling", "thinking", "judging")}) == 5
