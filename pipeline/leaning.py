"""The line between two answers, where all of a persona's items are answered by one of the same two (Yes and No).

A mask may rank such items rightly and yet answer Yes to all of them. What it leans to is a direction of its own: the
gradient of ``log p(Yes) - log p(No)`` over all items, whoever's answer that is. Weights are then chosen by their gain
for the persona and, at a price, by what they do to this; the price that draws the line in the middle is searched. The
two answers' gradients are taken one after the other.

Such a mask may draw its line by making both answers unlikely. Where no part of it is within the budget, the gradient of
the mean of both log-probabilities enters the gain at a fixed price (``BOTH_PRICE``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.forms import Item
from pipeline.data.prompts import Encoded, Prompter
from pipeline.likelihood import answer_scores
from pipeline.model import PersonaModel
from pipeline.objectives import Unit, WeightedAnswer

FEWEST = 4
"""Items that each of the two answers has to be the persona's own in."""
LEVEL, FIRST_STEP, TRIES = 0.1, 0.25, 7
"""The line is in the middle when it is off by at most this part of the distance between the two kinds of items; the
first step of the price, in nats of margin for a nat of leaning, and how many prices are tried."""

BOTH_PRICE = 1.0
"""Nats of margin for a nat of both answers' mean log-probability."""

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """Mean of ``log p(first) - log p(second)``, nats, over the items where the first answer is the persona's own, and
    over those where the second is."""

    first: float
    second: float

    @property
    def off(self) -> float:
        """How far the line between the two kinds is from indifference, as a share of their distance; positive: leans to
        the first answer. Where they are not apart, every line is as good."""
        distance = self.first - self.second
        return (self.first + self.second) / 2 / distance if distance > 0 else 0.0


def two_answers(pairs: Sequence[tuple[Encoded, Encoded]]) -> tuple[Answer, Answer] | None:
    """The two answers of all items, if there are no others and each is the first pole's own in ``FEWEST`` items."""
    own = [_answer(first) for first, _ in pairs]
    both = {frozenset((_answer(first), _answer(second))) for first, second in pairs}
    known = sorted(set(own))
    if len(both) != 1 or len(known) != 2 or min(own.count(answer) for answer in known) < FEWEST:
        return None
    return known[0], known[1]


def answer_units(units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]] | None:
    """The objectives ``log p(first)`` and ``log p(second)``, the means over a pair's items; None without two such
    answers. ``units`` are the pair's margin (``objectives.margin_units``)."""
    if any(len(unit) != 2 for unit in units):
        return None
    answers = two_answers([(unit[0].encoded, unit[1].encoded) for unit in units])
    if answers is None:
        return None
    terms = [WeightedAnswer(term.encoded, abs(term.weight)) for unit in units for term in unit]

    def of(answer: Answer) -> list[Unit]:
        return [(term,) for term in terms if _answer(term.encoded) == answer]

    return of(answers[0]), of(answers[1])


def line_of(
    items: Sequence[Item], prompter: Prompter, max_length: int, **sizes: Any
) -> Callable[[PersonaModel], Line] | None:
    """Measures where a mask draws the line on a persona's ``items``; None where there is no such line. ``sizes`` as for
    ``answer_scores``."""
    pairs = []
    for item in items:
        if item.other is None:
            return None
        pair = prompter.encode(item.question, item.matching), prompter.encode(item.question, item.other)
        if max(map(len, pair)) <= max_length:
            pairs.append(pair)
    answers = two_answers(pairs)
    if answers is None:
        return None
    own_first = [_answer(own) == answers[0] for own, _ in pairs]

    def measure(model: PersonaModel) -> Line:
        scores = answer_scores(model, [text for pair in pairs for text in pair], **sizes)
        margins = [own.mean - other.mean for own, other in zip(scores[::2], scores[1::2], strict=True)]
        first = [margin for margin, is_first in zip(margins, own_first, strict=True) if is_first]
        second = [-margin for margin, is_first in zip(margins, own_first, strict=True) if not is_first]
        return Line(sum(first) / len(first), sum(second) / len(second))

    return measure


def levelled(off: Callable[[float], float], start: float = 0.0) -> float:
    """The price at which a mask's line is in the middle, or of those tried the nearest to it; ``start`` is tried first.

    ``off(price)`` measures ``Line.off``; it falls as the price falls, more or less steadily.
    """
    tried = {start: off(start)}
    step = -FIRST_STEP if tried[start] > 0 else FIRST_STEP
    price = start + step
    # What does not rise with the price may lead back to one that was tried.
    while price not in tried and len(tried) < TRIES and min(map(abs, tried.values())) > LEVEL:
        tried[price] = off(price)
        above = [one for one, value in tried.items() if value > 0]
        below = [one for one, value in tried.items() if value <= 0]
        if not above or not below:
            step *= 2
            price += step
            continue
        # The nearest on either side: between them a straight line, kept away from both ends.
        high, low = min(above, key=lambda one: tried[one]), max(below, key=lambda one: tried[one])
        part = tried[high] / (tried[high] - tried[low])
        price = high + min(max(part, 0.1), 0.9) * (low - high)
    return min(tried, key=lambda one: abs(tried[one]))


def _answer(text: Encoded) -> Answer:
    return text.ids[text.answer :]
