"""The profile of a model along the four dichotomies, from a questionnaire (paper: figures 2 and 3, conversion T.)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.catalogue import DICHOTOMIES, TYPES
from pipeline.intervals import bootstrap_interval
from pipeline.protocol import Margins

CHANCE = 1 / 16
"""Probability that four coin flips are the four signs of a type."""


@dataclass(frozen=True)
class Lean:
    """How far one state of the model leans along one dichotomy. Field meanings: docs/questionnaire.md."""

    persona: str | None
    form: str
    dichotomy: str
    n: int
    margin: float
    low: float
    high: float
    shift: float
    shift_low: float
    shift_high: float
    share: float


@dataclass(frozen=True)
class Signs:
    """The signs of a state's leans in one form. Field meanings: docs/questionnaire.md."""

    persona: str | None
    form: str
    spelled: str
    expected: int
    right_zero: int
    right_unmasked: int


@dataclass(frozen=True)
class Summary:
    """How many of the types in a run came out right in one form. Field meanings: docs/questionnaire.md."""

    form: str
    types: int
    all_right_zero: int
    all_right_unmasked: int
    signs: int
    signs_right_zero: int
    signs_right_unmasked: int
    chance: float = CHANCE


def signs_of(persona: str) -> dict[str, int]:
    """Which way a persona should lean, by dichotomy: 1 towards the first pole, -1 towards the second.

    Four signs for a type, one for a pole, none for anybody else.
    """
    if persona in TYPES:
        return {name: 1 if first in persona else -1 for name, (first, _) in DICHOTOMIES.items()}
    return {name: 1 if persona == name.split("-")[0] else -1 for name in DICHOTOMIES if persona in name.split("-")}


def lean_of(persona: str | None, dichotomy: str, now: Margins, base: Margins, *, resamples: int, seed: int) -> Lean:
    """The lean of a state, held against the unmasked model on the same items; nats per token (or of the letter)."""
    shifts = [a - b for a, b in zip(now.normalised, base.normalised, strict=True)]
    return Lean(
        persona,
        now.form,
        dichotomy,
        len(now.normalised),
        sum(now.normalised) / len(now.normalised),
        *bootstrap_interval(now.normalised, resamples=resamples, seed=seed),
        sum(shifts) / len(shifts),
        *bootstrap_interval(shifts, resamples=resamples, seed=seed),
        now.accuracy(True, True),
    )


def spelled(margins: Mapping[str, float]) -> str:
    """The letters that the margins' signs spell, "INTJ"; "x" where a margin is 0, "?" where there is none."""
    letters = []
    for name, (first, second) in DICHOTOMIES.items():
        margin = margins.get(name)
        letters.append("?" if margin is None else "x" if margin == 0 else first if margin > 0 else second)
    return "".join(letters)


def signs_right(persona: str | None, form: str, leans: Sequence[Lean]) -> Signs:
    """Count the signs of one persona's leans in one form that are as they should be, from zero and from the unmasked.

    A lean or shift of exactly 0 is wrong.
    """
    own = {lean.dichotomy: lean for lean in leans if (lean.persona, lean.form) == (persona, form)}
    wanted = signs_of(persona) if persona else {}
    return Signs(
        persona,
        form,
        spelled({name: lean.margin for name, lean in own.items()}),
        len(wanted),
        sum(sign * own[name].margin > 0 for name, sign in wanted.items()),
        sum(sign * own[name].shift > 0 for name, sign in wanted.items()),
    )


def summary_of(form: str, signs: Sequence[Signs]) -> Summary:
    """Over the types among some states: how many have all four signs right, and how many signs are right."""
    types = [s for s in signs if s.form == form and s.persona in TYPES]
    return Summary(
        form,
        len(types),
        sum(s.right_zero == s.expected for s in types),
        sum(s.right_unmasked == s.expected for s in types),
        sum(s.expected for s in types),
        sum(s.right_zero for s in types),
        sum(s.right_unmasked for s in types),
    )
