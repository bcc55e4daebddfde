"""From the option ``--personas`` to persona sets: shipped dichotomies, the sixteen types, the user's files."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product

from pipeline.data.forms import NEUTRAL, Item
from pipeline.data.loader import Loaded, load_rows
from pipeline.errors import UserError

DICHOTOMIES = {
    "introvert-extravert": ("I", "E"),
    "intuitive-sensing": ("N", "S"),
    "feeling-thinking": ("F", "T"),
    "judging-perceiving": ("J", "P"),
}
"""The shipped sets by their two poles, with the letters that the types are spelled with."""

POLE_OF_LETTER = {
    letter: pole for name, letters in DICHOTOMIES.items() for letter, pole in zip(letters, name.split("-"), strict=True)
}
TYPES = tuple("".join(letters) for letters in product("IE", "NS", "FT", "JP"))

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What a persona may be called: it becomes a file name."""


VOICES = "voices:"
"""Marks a file in which one question has an answer per persona."""

CHARACTER_NAMES = ("pirate", "butler", "detective", "robot")
"""The shipped voices."""

ROLES = "roleagentbench:"
"""Marks a folder or hub id of RoleAgentBench's layout."""

RESERVED = ("none", NEUTRAL)
"""The unmasked model in the chat, and the neutral set."""


@dataclass(frozen=True)
class PersonaSet:
    """One pair of opposing personas and its items; ``minus`` is None for plain texts of one persona."""

    plus: str
    minus: str | None
    items: tuple[Item, ...]
    source: str

    @property
    def poles(self) -> tuple[str, ...]:
        return (self.plus,) if self.minus is None else (self.plus, self.minus)

    def split(self, name: str) -> tuple[Item, ...]:
        """Items of "calibration" or "test"; items without a split belong to both."""
        return tuple(item for item in self.items if item.split in ("", name))


@dataclass(frozen=True)
class Composition:
    """A persona united from others by weight, e.g. INTJ = introvert + intuitive + thinking + judging."""

    name: str
    parts: tuple[tuple[str, float], ...]


@dataclass
class Catalogue:
    """Everything that a run measures and masks. ``opponents`` maps a persona to its opposite, if it has one."""

    sets: list[PersonaSet]
    compositions: list[Composition]
    opponents: dict[str, str]
    problems: list[str]

    @property
    def measured(self) -> list[str]:
        """Personas with samples of their own, in order."""
        return [pole for personas in self.sets for pole in personas.poles]

    @property
    def personas(self) -> list[str]:
        """Every persona that gets a mask: the composed ones if there are any; never the neutral set."""
        return [c.name for c in self.compositions] or [pole for pole in self.measured if pole != NEUTRAL]


def load_catalogue(personas: str, *, compose: str = "", strict: bool = False) -> Catalogue:
    """Parse ``--personas`` and load the sets it names.

    ``personas`` is a comma-separated list of: ``dichotomies`` (the four shipped sets), ``types``
    (the sixteen types, united from them), a shipped set's name, a type such as ``INTJ``, or
    ``characters`` (the four shipped voices) or one of them such as ``pirate``, ``voices:FILE`` (a file
    of the voices form), ``roleagentbench:FOLDER`` (or hub id; the roles of its reactions), or
    ``[PLUS[/MINUS]=]SOURCE`` with a file or hub id of the user's own. ``compose`` adds mixtures,
    ``NAME[/OPPOSITE]=0.7*introvert+0.3*thinking``.
    """
    catalogue = Catalogue([], [], {}, [])
    for part in filter(None, (p.strip() for p in personas.split(","))):
        if part == "dichotomies":
            _add_sets(catalogue, *(shipped_set(name) for name in DICHOTOMIES))
        elif part in DICHOTOMIES:
            _add_sets(catalogue, shipped_set(part))
        elif voices := _voices(part, strict, catalogue.problems):
            _add_sets(catalogue, *voices)
        elif part.startswith(ROLES):
            _add_sets(catalogue, *_roles(part, strict, catalogue.problems))
        elif part == "types":
            for name in TYPES:
                _add_type(catalogue, name)
        elif part.upper() in TYPES:
            _add_type(catalogue, part.upper())
            _add_type(catalogue, opposite_type(part.upper()))
        else:
            _add_sets(catalogue, *_own_sets(part, strict, catalogue.problems))
    for part in filter(None, (p.strip() for p in compose.split(","))):
        _add_mixture(catalogue, part)
    if not catalogue.sets:
        raise UserError("--personas names no persona")
    return catalogue


def opposite_type(name: str) -> str:
    """INTJ -> ESFP."""
    flip = {a: b for pair in DICHOTOMIES.values() for a, b in (pair, pair[::-1])}
    return "".join(flip[letter] for letter in name)


def shipped_set(name: str) -> PersonaSet:
    """One of the four dichotomies written for this project."""
    loaded = load_rows(str(shipped_path(f"{name}.jsonl")), strict=True)
    plus, minus = name.split("-")
    return PersonaSet(plus, minus, tuple(loaded.items[None]), name)


def neutral_set() -> PersonaSet:
    """The 128 neutral question/answer pairs."""
    loaded = load_rows(str(shipped_path("neutral.jsonl")), strict=True)
    return PersonaSet(NEUTRAL, None, tuple(loaded.items[None]), NEUTRAL)


@cache
def neutral_texts() -> tuple[str, ...]:
    """The 40 short neutral texts on which perplexity is measured."""
    with open(str(shipped_path("perplexity.jsonl")), encoding="utf-8") as file:
        return tuple(json.loads(line)["text"] for line in file)


def persona_prompt(persona: str, source: str = "") -> str:
    """The system prompt that asks for a persona in words: the baseline every mask has to beat.

    ``source`` is that of the persona's set: a user's own "robot" is not the shipped one.
    """
    from pipeline.data.voices import CHARACTERS, character_prompt

    if source == CHARACTERS and not persona.startswith("not-"):
        return character_prompt(persona)
    with open(str(shipped_path("prompts.json")), encoding="utf-8") as file:
        prompts = json.load(file)
    if persona in prompts:
        return prompts[persona]
    if persona in TYPES:
        return " ".join(prompts[POLE_OF_LETTER[letter]] for letter in persona)
    if persona.startswith("not-"):
        return f"You are the opposite of the persona '{persona[4:]}'. Answer every question as such a person would."
    return f"You have the persona '{persona}'. Answer every question as such a person would."


def shipped_path(name: str):
    return resources.files("pipeline.data") / "sets" / name


def check_name(name: str) -> str:
    """Return ``name`` if it may name a persona; raises UserError."""
    if name in RESERVED:
        raise UserError(f"persona name {name!r} is reserved; name the personas PLUS/MINUS=SOURCE")
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"persona name {name[:80]!r}: letters, digits, '_', '.', '-' only, at most 64, the first a letter or digit"
        )
    return name


def _own_sets(part: str, strict: bool, problems: list[str]) -> list[PersonaSet]:
    names, has_names, source = part.rpartition("=")
    loaded = load_rows(source, strict=strict)
    problems += loaded.problems
    sets = [PersonaSet(check_name(p), None, tuple(items), source) for p, items in loaded.items.items() if p is not None]
    if None in loaded.items:
        sets.append(_pair(loaded, names if has_names else _default_name(source), source))
    elif has_names:
        raise UserError(f"{part}: the file names its personas itself ({', '.join(s.plus for s in sets)}); give no name")
    return sets


def _voices(part: str, strict: bool, problems: list[str]) -> list[PersonaSet]:
    """The sets of a part that names voices; none of one that does not."""
    # Here and not above: the voices form builds on this module.
    from pipeline.data.voices import against_the_others, voices_of

    voices = voices_of(part, strict=strict)
    if voices is None:
        return []
    problems += voices.problems
    return [one for one in against_the_others(voices) if part not in CHARACTER_NAMES or one.plus == part]


def _roles(part: str, strict: bool, problems: list[str]) -> list[PersonaSet]:
    # Here for the same reason.
    from pipeline.data.choices import load_reactions, reaction_sets

    choices, left_out = load_reactions(part.removeprefix(ROLES))
    if strict and left_out:
        raise UserError(left_out[0])
    problems += left_out
    return reaction_sets(choices, part)


def _pair(loaded: Loaded, names: str, source: str) -> PersonaSet:
    items = tuple(loaded.items[None])
    plus, _, minus = names.partition("/")
    paired = [item for item in items if item.other is not None]
    if paired and len(paired) < len(items):
        single = next(item for item in items if item.other is None)
        raise UserError(f"{single.source}: one answer, while other rows of the file have two; use one form per file")
    if paired:
        return PersonaSet(check_name(plus), check_name(minus or f"not-{plus}"), items, source)
    return PersonaSet(check_name(plus), None, items, source)


def _default_name(source: str) -> str:
    """The file's stem; for train/test files the folder's name."""
    parts = [p for p in re.split(r"[/\\]", re.sub(r"\.(csv|jsonl|json)$", "", source)) if p not in ("", ".", "..")]
    generic = {"train", "test", "calibration", "data"}
    name = parts[-2] if len(parts) > 1 and parts[-1].lower() in generic else parts[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "persona"


def _add_sets(catalogue: Catalogue, *sets: PersonaSet) -> None:
    for new in sets:
        if new.source in DICHOTOMIES and any(known.source == new.source for known in catalogue.sets):
            continue
        if new.plus == new.minus:
            raise UserError(f"{new.source}: both poles are called {new.plus!r}")
        for pole in new.poles:
            if pole in catalogue.measured or any(c.name == pole for c in catalogue.compositions):
                raise UserError(f"persona {pole!r} comes from two sources; name them apart (PLUS/MINUS=SOURCE)")
        catalogue.sets.append(new)
        if new.minus is not None:
            catalogue.opponents |= {new.plus: new.minus, new.minus: new.plus}


def _add_type(catalogue: Catalogue, name: str) -> None:
    if any(c.name == name for c in catalogue.compositions):
        return
    if name in catalogue.measured:
        raise UserError(f"persona {name!r} is a type and comes from a file too; name them apart (PLUS/MINUS=SOURCE)")
    for dichotomy, letters in DICHOTOMIES.items():
        if set(letters) & set(name):
            _add_sets(catalogue, shipped_set(dichotomy))
    catalogue.compositions.append(Composition(name, tuple((POLE_OF_LETTER[letter], 1.0) for letter in name)))
    catalogue.opponents[name] = opposite_type(name)


def _add_mixture(catalogue: Catalogue, text: str) -> None:
    names, equals, formula = text.partition("=")
    if not equals:
        raise UserError(f"--compose {text!r}: expected NAME[/OPPOSITE]=0.7*introvert+0.3*thinking")
    parts = []
    for term in formula.split("+"):
        weight, star, pole = (part.strip() for part in term.rpartition("*"))
        try:
            parts.append((pole, float(weight) if star else 1.0))
        except ValueError:
            raise UserError(f"--compose {text!r}: {weight!r} is not a number") from None
        if pole not in catalogue.measured:
            raise UserError(f"--compose {text!r}: unknown persona {pole!r}; known are {', '.join(catalogue.measured)}")
        if not 0 < parts[-1][1] < float("inf"):
            raise UserError(
                f"--compose {text!r}: the weight of {pole!r} must be positive and finite, got {parts[-1][1]}"
            )
    plus, _, minus = names.strip().partition("/")
    minus = minus or f"not-{plus}"
    if plus == minus:
        raise UserError(f"--compose {text!r}: both poles are called {plus!r}")
    mixtures = [Composition(check_name(plus), tuple(parts))]
    if all(pole in catalogue.opponents for pole, _ in parts):
        mixtures.append(Composition(check_name(minus), tuple((catalogue.opponents[p], w) for p, w in parts)))
        catalogue.opponents |= {plus: minus, minus: plus}
    for mixture in mixtures:
        if mixture.name in catalogue.measured or any(c.name == mixture.name for c in catalogue.compositions):
            raise UserError(f"--compose {text!r}: the name {mixture.name!r} is taken")
    catalogue.compositions += mixtures
