"""Role play as multiple choice: whose line a model finds likeliest (paper: the measure of RoleAgentBench)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.choices import Choice
from pipeline.data.prompts import Prompter
from pipeline.intervals import bootstrap_interval
from pipeline.likelihood import answer_scores
from pipeline.protocol import Earlier, Limits


@dataclass(frozen=True)
class Answered:
    """What a character chose over some items, one entry per item.

    ``right`` in [0, 1] (see ``credit``), ``raised`` the same for the line that gained most on the unmasked model,
    ``own`` the log-probability of its own line in nats per token, ``chosen`` the share of the choice that each line's
    speaker got.
    """

    right: list[float]
    raised: list[float]
    own: list[float]
    chosen: list[dict[str, float]]


def line_scores(
    model: Any,
    prompter: Prompter,
    choices: Sequence[Choice],
    *,
    system: str | None,
    limits: Limits,
    earlier: Earlier | None = None,
) -> list[list[float]]:
    """Per choice, the mean log-probability per token of every line, in nats, under the model as it is now."""
    sequences = [
        prompter.encode(choice.question, line, system, earlier(choice.question) if earlier else ())
        for choice in choices
        for line in choice.lines
    ]
    scores = answer_scores(model, limits.cut(sequences), batch_tokens=limits.batch_tokens, pad=limits.pad)
    means = iter(score.mean for score in scores)
    return [[next(means) for _ in choice.lines] for choice in choices]


def credit(scores: Sequence[float]) -> list[float]:
    """What each line gets of the choice: 1 for the likeliest, shared evenly by those that tie for it."""
    best = max(scores)
    tied = sum(score == best for score in scores)
    return [1 / tied if score == best else 0.0 for score in scores]


def answered(
    choices: Sequence[Choice], scores: Sequence[Sequence[float]], base: Sequence[Sequence[float]], character: str
) -> Answered:
    """What a character made of the choices that have a line of its own; ``base`` are the unmasked model's scores."""
    right, raised, own, chosen = [], [], [], []
    for choice, row, before in zip(choices, scores, base, strict=True):
        if character not in choice.right:
            continue
        shares, place = credit(row), choice.right[character]
        right.append(shares[place])
        raised.append(credit([a - b for a, b in zip(row, before, strict=True)])[place])
        own.append(row[place])
        chosen.append(dict(zip(choice.speakers, shares, strict=True)) if choice.speakers else {})
    return Answered(right, raised, own, chosen)


def chance(choices: Sequence[Choice], character: str) -> float:
    """The accuracy of a guess: the mean of one over the number of lines."""
    counts = [len(choice.lines) for choice in choices if character in choice.right]
    return sum(1 / count for count in counts) / len(counts)


@dataclass(frozen=True)
class RoleRecord:
    """One condition and character. Field meanings: docs/roleplay.md."""

    condition: str
    persona: str | None
    n: int
    chance: float
    accuracy: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    raised: float
    raised_low: float
    raised_high: float
    own_line: float
    own_line_change: float
    chosen: dict[str, float]
    removed: float
    perplexity: float


def role_record(
    condition: str,
    persona: str | None,
    now: Answered,
    base: Answered,
    *,
    guess: float,
    removed: float,
    perplexity: float,
    resamples: int,
    seed: int,
) -> RoleRecord:
    """The record of a character under a condition, held against the unmasked model on the same items."""
    gains = [a - b for a, b in zip(now.right, base.right, strict=True)]
    return RoleRecord(
        condition,
        persona,
        len(now.right),
        guess,
        _mean(now.right),
        *bootstrap_interval(now.right, resamples=resamples, seed=seed),
        _mean(gains),
        *bootstrap_interval(gains, resamples=resamples, seed=seed),
        _mean(now.raised),
        *bootstrap_interval(now.raised, resamples=resamples, seed=seed),
        _mean(now.own),
        _mean(now.own) - _mean(base.own),
        {name: _mean([shares[name] for shares in now.chosen]) for name in now.chosen[0]},
        removed,
        perplexity,
    )


def together(parts: Sequence[Answered]) -> Answered:
    """The mean over characters, question by question; the characters must have answered the same questions."""
    rows = range(len(parts[0].right))
    return Answered(
        [_mean([part.right[row] for part in parts]) for row in rows],
        [_mean([part.raised[row] for part in parts]) for row in rows],
        [_mean([part.own[row] for part in parts]) for row in rows],
        [{name: _mean([p.chosen[row][name] for p in parts]) for name in parts[0].chosen[row]} for row in rows],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
