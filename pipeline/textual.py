"""What a state of the model does to the text that it writes: repetition, length, and whom the text speaks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.catalogue import PersonaSet
from pipeline.data.forms import Item
from pipeline.generation import continuations
from pipeline.intervals import bootstrap_interval
from pipeline.likelihood import answer_scores
from pipeline.setting import UNMASKED, Ground, Setting, applied, prompt_ids

LENGTH = 48
"""Longest answer in tokens."""
GRAM = 3
"""Length of the runs of tokens whose repetition is counted."""
SPEAKING = ("prompt", "in context", "steering vector", "fine-tuned", "own mask", "prompt and mask")
"""Conditions whose text is looked at beside the unmasked model's, where they were asked for."""


@dataclass(frozen=True)
class Text:
    """An answer. ``tokens`` is its length, ``repetition`` in [0, 1], ``judged`` in nats per token."""

    question: str
    answer: str
    tokens: int
    repetition: float
    judged: float


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of three tokens that occurred earlier in the same text; 0 for a text without any."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def chosen_items(pair: PersonaSet, count: int) -> list[Item]:
    """The first ``count`` items of a pair that ask different questions."""
    first = {item.question: item for item in reversed(pair.items)}
    return [first[question] for question in dict.fromkeys(item.question for item in pair.items)][:count]


def texts_of(ground: Ground, setting: Setting, items: Sequence[Item], temperature: float = 0.0) -> list[Text]:
    """The answers under a setting to the questions of some items, measured; greedy at temperature 0."""
    prompter, limits = ground.prompter, ground.limits
    prompts = [prompt_ids(ground, setting, item.question) for item in items]
    with applied(ground, setting):
        sampling: dict[str, Any] = {
            "batch_tokens": limits.batch_tokens,
            "temperature": temperature,
            "seed": ground.config.seed,
        }
        written = continuations(ground.model, prompter.tokenizer, prompts, LENGTH, **sampling)
    answers = [prompter.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written]
    judgements = judged(ground, items, answers)
    return [
        Text(item.question, answer, len(tokens), repetition(tokens), margin)
        for item, answer, tokens, margin in zip(items, answers, written, judgements, strict=True)
    ]


def judged(ground: Ground, items: Sequence[Item], answers: Sequence[str]) -> list[float]:
    """For each item, how much likelier the first pole's reference answer is than the other's after the text.

    The unmasked model reads the question, the text as its answer, and the question again. Nats per token of the
    references, positive towards the first pole; what the model thinks without a text is in it too, so compare.
    """
    sequences = []
    for item, text in zip(items, answers, strict=True):
        assert item.other is not None
        for reference in (item.matching, item.other):
            sequences.append(ground.prompter.encode(item.question, reference, None, [(item.question, text)]))
    limits = ground.limits
    with applied(ground, UNMASKED):
        scores = answer_scores(
            ground.model.model, limits.cut(sequences), batch_tokens=limits.batch_tokens, pad=limits.pad
        )
    return [a.mean - b.mean for a, b in zip(scores[::2], scores[1::2], strict=True)]


def generation_entry(
    ground: Ground,
    pair: PersonaSet,
    setting: Setting,
    texts: Sequence[Text],
    unmasked: Sequence[Text],
    temperature: float,
) -> dict[str, Any]:
    """One entry of the JSON's ``generation``: means over the texts, how much more they repeat than the ``unmasked``
    model's to the same questions, with its interval, and the texts."""

    def mean(name: str) -> float:
        return sum(getattr(text, name) for text in texts) / len(texts)

    more = [text.repetition - before.repetition for text, before in zip(texts, unmasked, strict=True)]
    low, high = bootstrap_interval(more, resamples=ground.config.bootstrap, seed=ground.config.seed)
    return {
        "pair": f"{pair.plus}/{pair.minus}",
        "condition": setting.condition,
        "persona": setting.persona or None,
        "temperature": temperature,
        "n": len(texts),
        **{name: mean(name) for name in ("tokens", "repetition", "judged")},
        "repeated_more": sum(more) / len(more),
        "repeated_more_low": low,
        "repeated_more_high": high,
        "answers": [vars(text) for text in texts],
    }
