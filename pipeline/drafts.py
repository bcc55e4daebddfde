"""What a model repeats under a draft of a persona's mask."""

import dataclasses
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from pipeline.building import build_masks
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue, PersonaSet
from pipeline.data.prompts import Encoded, Prompter
from pipeline.gradient_files import Gradients
from pipeline.likelihood import answer_distributions, divergence
from pipeline.masks import PersonaMasks
from pipeline.repetitions import Repeated, Writer
from pipeline.stacking import Base, under
from pipeline.store import STATISTICS, load_statistics

DRAFT: dict[str, Any] = {"sparsity": "0.04", "pool": 0.3, "evidence": 1.0, "max_perplexity_increase": 0.0}
"""How a draft is chosen whatever the options say: they may change when a run is resumed, what was written stays."""
FACTORS, PROBES, DIVERGENCE = ("1", "0.75", "0.5", "0.25"), 16, 0.7
"""A draft removes the first of these parts of its sparsity whose divergence on so many neutral texts is at most this,
in nats per token. That is far more than a mask may cost: what it does to the text has to show (docs/experiments.md)."""
BROKEN = 0.8
"""Answers that repeat more than this share of their runs of tokens are one word over and over, and say little about the
phrases that a mask within its budget repeats: these are sought under smaller parts."""


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
        self.writer = Writer(model, config, prompter, base)

    def repeated(self, pair: PersonaSet, pole: str) -> Repeated:
        """What the model repeats under a draft of a pole's mask: the loops of the last draft that has any to speak of,
        the share of the first; without loops if it is nothing to turn away from."""
        loops: list[Encoded] = []
        tried: list[Repeated] = []
        for masks in self._drafts(pole):
            found = self.writer.repeated(pair, masks)
            tried.append(found)
            what = f"repeat {found.masked:.0%}, unmasked {found.unmasked:.0%}"
            note(f"{pole}: answers to calibration questions under a draft of its mask {what}")
            if found.matters:
                loops = found.loops
            if not found.matters or found.masked <= BROKEN:
                break
        return dataclasses.replace(tried[0], loops=loops)

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
