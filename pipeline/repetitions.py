"""What a model repeats in its answers to a pair's calibration questions, with and without a mask."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import PersonaSet
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter
from pipeline.generation import continuations
from pipeline.loading import position_limit
from pipeline.loops import loop_of
from pipeline.masks import PersonaMasks
from pipeline.memory import in_halves
from pipeline.stacking import Base, under
from pipeline.textual import LENGTH, repetition

QUESTIONS = 48
"""Calibration questions at most that are answered."""
FEWEST, LEAST = 8, 0.05
"""Repetitions, and how many more than without a mask (a share of all runs of tokens), that are worth turning away
from."""


@dataclasses.dataclass(frozen=True)
class Repeated:
    """``loops``: repetitions as answers (``pipeline.loops``). ``unmasked`` and ``masked``: the share of runs of three
    tokens that occurred earlier in the same answer, the mean over answers without a mask and under one."""

    loops: list[Encoded]
    unmasked: float
    masked: float

    @property
    def excess(self) -> float:
        """How much more is repeated under the mask; 0 without ``loops``."""
        return self.masked - self.unmasked if self.loops else 0.0

    @property
    def matters(self) -> bool:
        """Is there enough to turn away from?"""
        return len(self.loops) >= FEWEST and self.excess >= LEAST


class Writer:
    """Answers the calibration questions of pairs. ``model``: without masks, but for what ``base`` has pruned."""

    def __init__(self, model: Any, config: CalibrateConfig, prompter: Prompter, base: Base | None = None) -> None:
        self.model, self.config, self.prompter, self.base = model, config, prompter, base
        self._unmasked: dict[str, float] = {}

    def repeated(self, pair: PersonaSet, masks: PersonaMasks, unmasked: float | None = None) -> Repeated:
        """What the model repeats under masks of one persona, with the pair's questions; ``unmasked`` if it is known."""
        prompts = self._prompts(pair)
        before = self._share(pair, prompts) if unmasked is None else unmasked
        with under(self.model, masks, self.base) as model:
            written = self._continued(model, prompts)
        found = (loop_of(prompt, text) for prompt, text in zip(prompts, written, strict=True))
        return Repeated([loop for loop in found if loop], before, _mean_repetition(written))

    def _share(self, pair: PersonaSet, prompts: Sequence[list[int]]) -> float:
        """How much the unmasked model repeats itself; both poles are asked the same."""
        if pair.plus not in self._unmasked:
            self._unmasked[pair.plus] = _mean_repetition(self._continued(self.model, prompts))
        return self._unmasked[pair.plus]

    def _prompts(self, pair: PersonaSet) -> list[list[int]]:
        """The calibration questions, each once, that leave room for an answer."""
        items = draw(pair.split("calibration"), self.config.samples, self.config.seed)
        limit = min(self.config.max_length, (position_limit(self.config.model) or math.inf) - LENGTH)
        questions = filter(None, dict.fromkeys(item.question for item in items))
        prompts = (self.prompter.ids(self.prompter.prompt(question)) for question in questions)
        return [ids for ids in prompts if 0 < len(ids) <= limit][:QUESTIONS]

    def _continued(self, model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Greedy answers; in halves if memory is short."""
        write = partial(continuations, model, self.prompter.tokenizer, max_new_tokens=LENGTH)
        return in_halves(
            lambda some: write(some, batch_tokens=self.config.batch_tokens),
            prompts,
            "prompts",
            lambda prompt: f"in writing after {len(prompt)} tokens",
            self.config.undivided,
        )


def _mean_repetition(texts: Sequence[Sequence[int]]) -> float:
    return sum(map(repetition, texts)) / max(len(texts), 1)
