"""Calibration samples as a LightningDataModule: batches formed once, dealt out whole to the ranks."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kernels.ops.activation_stats import IGNORED
from pipeline.data.catalogue import PersonaSet
from pipeline.data.forms import Item
from pipeline.data.prompts import Encoded, Prompter, batches_by_tokens, roles
from pipeline.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One sequence of one persona; ``source`` names it in errors."""

    persona: int
    encoded: Encoded
    source: str


@dataclass
class Batch:
    """Right-padded: ``ids``, ``attention`` int64 ``[B, T]``, ``role`` uint8 ``[B, T]``, ``persona`` int64 ``[B]``."""

    ids: Tensor
    attention: Tensor
    role: Tensor
    persona: Tensor
    sources: list[str]

    def to(self, device: torch.device) -> "Batch":
        ids, attention, role, persona = (t.to(device) for t in (self.ids, self.attention, self.role, self.persona))
        return Batch(ids, attention, role, persona, self.sources)

    def part(self, rows: Sequence[int]) -> "Batch":
        """Some of its sequences, without the padding that they do not need."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.ids.device)
        width = int(self.attention[chosen].sum(1).max())
        ids, attention, role = (t[chosen, :width] for t in (self.ids, self.attention, self.role))
        return Batch(ids, attention, role, self.persona[chosen], [self.sources[row] for row in rows])


def draw(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """``count`` items at random (0: all), the same for the same seed."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order[:count] if count else order


def make_samples(
    sets: Iterable[PersonaSet], prompter: Prompter, *, count: int, max_length: int, seed: int
) -> tuple[list[Sample], list[str]]:
    """Encode ``count`` calibration items of every set, each as one sample per pole.

    Returns the samples and the problems: items whose question fills ``max_length`` are left out.
    Raises UserError for a persona without a usable sample.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    persona = 0
    for personas in sets:
        chosen = draw(personas.split("calibration"), count, seed)
        for pole in range(len(personas.poles)):
            before = len(samples)
            for item in chosen:
                answer = item.matching if pole == 0 else item.other
                assert answer is not None
                encoded = prompter.encode(item.question, answer)
                if encoded.answer >= max_length or len(encoded) < 2:
                    problems.append(
                        f"{item.source}: {encoded.answer} prompt tokens, --max-length is {max_length}; left out"
                    )
                    continue
                cut = Encoded(encoded.ids[:max_length], encoded.answer, encoded.question)
                samples.append(Sample(persona, cut, f"{item.source} ({personas.poles[pole]})"))
            if len(samples) == before:
                raise UserError(f"persona {personas.poles[pole]!r} of {personas.source} has no usable calibration item")
            persona += 1
    return samples, problems


class CalibrationData(lightning.LightningDataModule):
    """Deals batches to ranks: rank r gets batches r, r + world, ...; every sample is counted exactly once.

    A rank that would get fewer batches than another gets empty ones, so that all run the same number
    of steps.
    """

    def __init__(self, samples: Sequence[Sample], *, tokens: str, batch_tokens: int, pad: int) -> None:
        super().__init__()
        self.samples, self.tokens, self.pad = samples, tokens, pad
        self.batches = batches_by_tokens([len(s.encoded) for s in samples], batch_tokens)

    def share(self, rank: int, world: int) -> list[list[int]]:
        """The batches of one rank, as sample indices."""
        steps = -(-len(self.batches) // world)
        mine = self.batches[rank::world]
        return mine + [[]] * (steps - len(mine))

    def predict_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        mine = self.share(trainer.global_rank, trainer.world_size)
        return DataLoader(mine, batch_size=None, collate_fn=self.collate)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def collate(self, indices: Sequence[int]) -> Batch:
        chosen = [self.samples[i] for i in indices]
        width = max((len(s.encoded) for s in chosen), default=0)
        shape = (len(chosen), width)
        ids = torch.full(shape, self.pad, dtype=torch.int64)
        attention = torch.zeros(shape, dtype=torch.int64)
        role = torch.full(shape, IGNORED, dtype=torch.uint8)
        for row, sample in enumerate(chosen):
            length = len(sample.encoded)
            ids[row, :length] = torch.tensor(sample.encoded.ids)
            attention[row, :length] = 1
            role[row, :length] = torch.tensor(roles(sample.encoded, self.tokens), dtype=torch.uint8)
        persona = torch.tensor([s.persona for s in chosen], dtype=torch.int64)
        return Batch(ids, attention, role, persona, [s.source for s in chosen])
