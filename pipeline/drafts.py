"""What a model repeats under a draft of a persona's mask."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.building import build_masks
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue, PersonaSet
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter
from pipeline.generation import continuations
from pipeline.gradient_files import Gradients
from pipeline.likelihood import answer_distributions, divergence
from pipeline.loading import position_limit
from pipeline.loops import loop_of
from pipeline.masks import PersonaMasks
from pipeline.memory import in_halves
from pipeline.stacking import Base, under
from pipeline.store import STATISTICS, load_statistics
from pipeline.textual import LENGTH, repetition

QUESTIONS = 48
"""Calibration questions at most that are answered under a pole's draft."""
FEWEST, LEAST = 8, 0.05
"""Repetitions, and how many more than without a mask (a share of all runs of tokens), that are worth turning away
from."""
DRAFT: dict[str, Any] = {"sparsity": "0.04", "pool": 0.3, "evidence": 1.0, "max_perplexity_increase": 0.0}
"""How a draft is chosen whatever the options say: they may change when a run is resumed, what was written stays."""
FACTORS, PROBES, DIVERGENCE = ("1", "0.75", "0.5", "0.25"), 16, 0.7
"""A draft removes the first of these parts of its sparsity whose divergence on so many neutral texts is at most this,
in nats per token. That is far more than a mask may cost: what it does to the text has to show (docs/experiments.md)."""
BROKEN = 0.8
"""Answers that repeat more than this share of their runs of tokens are one word over and over, and say little about the
phrases that a mask within its budget repeats: these are sought under smaller parts."""


@dataclasses.dataclass(frozen=True)
class Repeated:
    """``loops``: repetitions as answers (``pipeline.loops``). ``unmasked`` and ``drafted``: the share of runs of three
    tokens that occurred earlier in the same answer, without a mask and under the first draft."""

    loops: list[Encoded]
    unmasked: float
    drafted: float

    @property
    def excess(self) -> float:
        """How much more is repeated under the draft; 0 without ``loops``."""
        return self.drafted - self.unmasked if self.loops else 0.0


NOTHING = Repeated([], 0.0, 0.0)


class Drafts:
    """Drafts the masks of poles and writes under them.

    Args:
        model: without masks, on ``device``.
        folder: the run's staging folder, with statistics and the gradients of plain margins.
        neutral: texts on which a draft's divergence is measured.
        base: has pruned ``model``.
    """

    def __init__(
        self,
        model: Any,
        config: CalibrateConfig,
        folder: Path,
        catalogue: Catalogue,
        prompter: Prompter,
        neutral: Sequence[Encoded],
        device: torch.device,
        base: Base | None = None,
    ) -> None:
        self.model, self.config, self.folder, self.catalogue = model, config, folder, catalogue
        self.prompter, self.neutral, self.device = prompter, neutral, device
        self.base = base
        self.unmasked: dict[str, float] = {}

    def repeated(self, pair: PersonaSet, pole: str) -> Repeated:
        """What the model repeats under a draft of a pole's mask, where that is worth turning away from."""
        prompts = self._prompts(pair)
        before = self._share(pair, prompts)
        loops: list[Encoded] = []
        shares: list[float] = []
        for masks in self._drafts(pole):
            with under(self.model, masks, self.base) as model:
                written = self._continued(model, prompts)
            after = _mean_repetition(written)
            shares.append(after)
            note(f"{pole}: {len(written)} answers under a draft of its mask repeat {after:.0%}, unmasked {before:.0%}")
            found = [loop for prompt, text in zip(prompts, written, strict=True) if (loop := loop_of(prompt, text))]
            worth = len(found) >= FEWEST and after - before >= LEAST
            if worth:
                loops = found
            if not worth or after <= BROKEN:
                break
        return Repeated(loops, before, shares[0])

    def _share(self, pair: PersonaSet, prompts: Sequence[list[int]]) -> float:
        """How much the unmasked model repeats itself in answering a pair's questions; both poles ask the same."""
        if pair.plus not in self.unmasked:
            self.unmasked[pair.plus] = _mean_repetition(self._continued(self.model, prompts))
        return self.unmasked[pair.plus]

    def _prompts(self, pair: PersonaSet) -> list[list[int]]:
        """The calibration questions, each once, that leave room for an answer."""
        items = draw(pair.split("calibration"), self.config.samples, self.config.seed)
        limit = min(self.config.max_length, (position_limit(self.config.model) or math.inf) - LENGTH)
        questions = filter(None, dict.fromkeys(item.question for item in items))
        prompts = (self.prompter.ids(self.prompter.prompt(question)) for question in questions)
        return [ids for ids in prompts if 0 < len(ids) <= limit][:QUESTIONS]

    def _drafts(self, persona: str) -> Iterator[PersonaMasks]:
        """The first part whose divergence is small enough, then smaller ones."""
        config = dataclasses.replace(self.config, **DRAFT)
        stats = load_statistics(self.folder / STATISTICS).to(self.device)
        gradients = Gradients(self.folder, self.catalogue)
        within = False
        for factor in FACTORS:
            masks = build_masks(
                self.model,
                stats,
                self.catalogue,
                config,
                gradients,
                only=persona,
                factor=Decimal(factor),
                base=self.base,
            )
            within = within or factor == FACTORS[-1] or self._is_close(masks)
            if within:
                yield masks

    def _is_close(self, masks: PersonaMasks) -> bool:
        """Does the model under a draft diverge little enough on neutral texts?"""
        sizes: dict[str, Any] = {
            "batch_tokens": self.config.batch_tokens,
            "pad": self.prompter.tokenizer.pad_token_id,
            "undivided": self.config.undivided,
        }
        texts = self.neutral[:PROBES]
        unmasked = answer_distributions(self.model, texts, **sizes)
        with under(self.model, masks, self.base) as model:
            return divergence(unmasked, model, texts, **sizes) <= DIVERGENCE

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
