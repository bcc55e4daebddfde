"""Which items a run is evaluated on."""

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.data.catalogue import (
    DICHOTOMIES,
    ROLES,
    TYPES,
    VOICES,
    Catalogue,
    PersonaSet,
    load_catalogue,
    shipped_set,
)
from pipeline.data.forms import Item
from pipeline.data.voices import CHARACTERS, against_the_others, shipped_characters
from pipeline.errors import UserError
from pipeline.fingerprint import question_hash


def held_out(manifest: dict[str, Any], data: str, strict: bool, say: Callable[[str], None]) -> list[PersonaSet]:
    """The pairs to evaluate: from ``--data``, else the shipped sets' test split (types: united from them).

    Items whose question was calibrated on are left out and counted aloud. Raises UserError if a set has
    no items left or its personas are not in the run.
    """
    opponents: dict[str, str] = manifest["personas"]["opponents"]
    sets = _from_data(data, opponents, strict, say) if data else _shipped(opponents, manifest["personas"]["sources"])
    if not sets:
        known = ", ".join(manifest["masks"])
        raise UserError(f"no held-out items are shipped for these personas ({known}); give --data PLUS/MINUS=SOURCE")
    used = {h for hashes in manifest["personas"]["questions"].values() for h in hashes}
    clean = []
    for pair in sets:
        items = pair.split("test")
        fresh = tuple(i for i in items if question_hash(i) not in used)
        if len(fresh) < len(items):
            say(f"{pair.plus}: {len(items) - len(fresh)} of {len(items)} items left out, they were calibrated on")
        if not fresh:
            raise UserError(f"{pair.source}: no item is left that was not calibrated on")
        clean.append(PersonaSet(pair.plus, pair.minus, fresh, pair.source))
    return clean


def _shipped(opponents: dict[str, str], sources: dict[str, str]) -> list[PersonaSet]:
    sets = []
    for name in DICHOTOMIES:
        plus, minus = name.split("-")
        if plus in opponents and opponents[plus] == minus:
            sets.append(shipped_set(name))
    # By source: a user's own pirate is not the shipped one.
    if CHARACTERS in sources.values():
        sets += [one for one in against_the_others(shipped_characters()) if sources.get(one.plus) == CHARACTERS]
    for name in TYPES:
        # Each pair of opposite types once, from the introvert's side.
        if name[0] == "I" and name in opponents:
            sets.append(PersonaSet(name, opponents[name], tuple(type_items(name)), "types"))
    return sets


def type_items(name: str) -> Iterable[Item]:
    """The items of the four dichotomies, seen from the poles of a type."""
    for dichotomy, (first, _) in DICHOTOMIES.items():
        for item in shipped_set(dichotomy).items:
            yield item if first in name else item.swapped()


def _from_data(data: str, opponents: dict[str, str], strict: bool, say: Callable[[str], None]) -> list[PersonaSet]:
    parts = [p.strip() for p in data.split(",") if p.strip()]
    if len(parts) == 1 and "=" not in parts[0] and not parts[0].startswith((VOICES, ROLES)) and len(opponents) == 2:
        # One pair of personas, one file: no need to name them again.
        plus = next(iter(opponents))
        parts = [f"{plus}/{opponents[plus]}={parts[0]}"]
    catalogue: Catalogue = load_catalogue(",".join(parts), strict=strict)
    for problem in catalogue.problems:
        say(f"left out: {problem}")
    for pair in catalogue.sets:
        if pair.minus is None or opponents.get(pair.plus) != pair.minus:
            pairs = ", ".join(f"{a}/{b}" for a, b in opponents.items())
            raise UserError(f"{pair.source}: {'/'.join(pair.poles)} is not a pair of this run; known are {pairs}")
    return catalogue.sets
