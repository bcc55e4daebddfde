"""What a model says again: its own repetitions, as answers that a mask should make less likely."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.prompts import Encoded
from pipeline.textual import GRAM

LONGEST = 14
"""Tokens of a repetition at most."""


def as_json(loop: Encoded) -> dict[str, Any]:
    """A repetition as files hold it."""
    return {"ids": list(loop.ids), "answer": loop.answer}


def from_json(found: dict[str, Any]) -> Encoded:
    """What ``as_json`` wrote."""
    return Encoded(tuple(found["ids"]), found["answer"], range(0))


def loop_of(prompt: Sequence[int], written: Sequence[int]) -> Encoded | None:
    """The first repetition in an answer, or None: up to where three tokens in a row are to occur again it is context.

    What follows, from the token that completes them, is the repetition, ``LONGEST`` tokens at most.
    """
    seen = set()
    for start in range(len(written) - GRAM + 1):
        gram = tuple(written[start : start + GRAM])
        if gram in seen:
            context = start + GRAM - 1
            return Encoded((*prompt, *written[: context + LONGEST]), len(prompt) + context, range(0))
        seen.add(gram)
    return None
