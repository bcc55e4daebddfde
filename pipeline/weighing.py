"""How much each calibration answer counts, for every pole, and what the masked model repeats among them.

A mask chosen by a pair's answers alone can make the model repeat itself. So each pole has a draft of its mask, from the
gradient of the plain margin; the model answers calibration questions under it; and what it repeats there is a third
group of texts in the discriminant (``pipeline.whitening``), which the pole's direction turns away from.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.building import build_masks
from pipeline.calibration import Stage, spread_threads
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue, PersonaSet
from pipeline.data.forms import NEUTRAL
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter, batches_by_tokens
from pipeline.errors import UserError
from pipeline.generation import continuations
from pipeline.gradient_files import Gradients
from pipeline.likelihood import answer_distributions, divergence
from pipeline.loading import position_limit
from pipeline.loops import loop_of
from pipeline.masks import PersonaMasks
from pipeline.memory import halves, is_out_of_memory, make_room
from pipeline.model import PersonaModel
from pipeline.objectives import Unit, WeightedAnswer
from pipeline.sites import maskable
from pipeline.sketching import (
    SCALE,
    SKETCHES,
    Coordinates,
    Sketcher,
    beginning_of,
    check_finite,
    is_sketched,
    sketch_file,
    sketching,
)
from pipeline.stacking import base_masks
from pipeline.store import STATISTICS, load_statistics, write_json
from pipeline.textual import LENGTH, repetition
from pipeline.whitening import contrast_weights, standardised

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


@dataclasses.dataclass(frozen=True)
class Pole:
    """One pole of a pair: ``own`` and ``other``, its answers and its opponent's."""

    pair: PersonaSet
    name: str
    own: list[WeightedAnswer]
    other: list[WeightedAnswer]


def poles_of(catalogue: Catalogue, objectives: dict[str, list[Unit]], config: CalibrateConfig) -> list[Pole]:
    """The poles that have a direction of their own; without repetitions that of a pair serves both its poles."""
    found = []
    for pair in catalogue.sets:
        if pair.minus is None or not is_sketched(pair.plus, objectives[pair.plus]):
            continue
        plus, minus = (list(column) for column in zip(*objectives[pair.plus], strict=True))
        found.append(Pole(pair, pair.plus, plus, minus))
        if config.loop_weight:
            found.append(Pole(pair, pair.minus, minus, plus))
    return found


def weighted(poles: Sequence[Pole], neutral: Sequence[Unit], folder: Path) -> dict[str, list[Unit]]:
    """Every pole's objective: its answers, its opponent's, its repetitions and neutral texts, as ``WeighingModule``
    weighted them. Without repetitions a pair's second pole has that of the first, with the other sign."""
    found = {pole.name: json.loads((folder / weighing_file(pole.name)).read_bytes()) for pole in poles}
    return {
        pole.name: _units(pole, found[pole.name], neutral)
        for pole in poles
        if pole.name == pole.pair.plus or found[pole.name]["loops"] or found[pole.pair.plus]["loops"]
    }


def _units(pole: Pole, found: dict[str, Any], neutral: Sequence[Unit]) -> list[Unit]:
    loops = [Encoded(tuple(one["ids"]), one["answer"], range(0)) for one in found["loops"]]
    weights, n = found["weights"], len(pole.own)
    pairs = zip(pole.own, pole.other, weights[:n], weights[n : 2 * n], strict=True)
    units: list[Unit] = [(_mean(a.encoded, c), _mean(b.encoded, d)) for a, b, c, d in pairs]
    texts = [*loops, *(unit[0].encoded for unit in neutral)]
    return units + [(_mean(text, c),) for text, c in zip(texts, weights[2 * n :], strict=True)]


def _mean(answer: Encoded, weight: float = 1.0) -> WeightedAnswer:
    return WeightedAnswer(answer, weight / max(WeightedAnswer(answer, 1.0).tokens, 1))


class WeighingModule(Stage):
    """Finds the weights of every pole's answers and writes them to ``folder / weighing_file(name)``.

    JSON: ``weights`` of its own answers, its opponent's, the repetitions and the neutral texts, in this order;
    ``loops``, the repetitions as token ids with the place where the answer begins and their text; ``against``, what
    they weigh; and ``repetition``, the share of repeated runs of three tokens in what was written without a mask and
    under the draft. Rank r takes every world-th pole from r on; what an earlier process wrote stays.
    """

    def __init__(
        self,
        config: CalibrateConfig,
        folder: Path,
        catalogue: Catalogue,
        prompter: Prompter,
        poles: Sequence[Pole],
        objectives: dict[str, list[Unit]],
    ) -> None:
        super().__init__(config, folder)
        self.catalogue, self.prompter = catalogue, prompter
        self.poles = {pole.name: pole for pole in poles}
        self.neutral = [unit[0].encoded for unit in objectives[NEUTRAL]]
        self.beginning = beginning_of(objectives)
        self.pad = prompter.tokenizer.pad_token_id
        self.unmasked: dict[str, float] = {}

    def is_done(self) -> bool:
        return all((self.folder / weighing_file(name)).exists() for name in self.poles)

    def load(self) -> None:
        # Without repetitions there is nothing to write, and the sketches say all.
        if self.config.loop_weight:
            super().load()

    def on_predict_start(self) -> None:
        if not self.skipped:
            spread_threads(self.trainer, self.device, self.config.deterministic)

    def predict_dataloader(self) -> DataLoader[Any]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        # By name: Lightning's precision plugins rebuild dataclasses. All ranks take equally many steps.
        mine: list[str | None] = [*list(self.poles)[rank::world]]
        mine += [None] * (-(-len(self.poles) // world) - len(mine))
        return DataLoader(mine, batch_size=None, collate_fn=lambda name: name)  # type: ignore[arg-type]

    def predict_step(self, name: str | None, batch_idx: int) -> None:
        if name is None or self.skipped or (self.folder / weighing_file(name)).exists():
            return
        pole = self.poles[name]
        loops, against, shares = self._repeated(pole) if self.config.loop_weight else ([], 0.0, (0.0, 0.0))
        answers, neutral = (self._sketches(name) for name in (pole.pair.plus, NEUTRAL))
        own, other = answers.chunk(2) if pole.name == pole.pair.plus else answers.chunk(2)[::-1]
        every = standardised(own, other, self._sketch(pole, loops, answers.shape[1]), neutral)
        every /= math.sqrt(every.shape[1])
        weights = contrast_weights(every @ every.T, len(own), len(loops), against=against)
        decode = self.prompter.tokenizer.decode
        found = [{"ids": list(x.ids), "answer": x.answer, "text": decode(x.ids[x.answer :])} for x in loops]
        content = {"weights": weights.tolist(), "against": against, "repetition": shares, "loops": found}
        write_json(self.folder / weighing_file(pole.name), content)

    def on_predict_end(self) -> None:
        # The others read the files next.
        self.trainer.strategy.barrier("answers weighed")

    def _sketches(self, name: str) -> Tensor:
        return load_file(str(self.folder / sketch_file(name)))[SKETCHES]

    def _repeated(self, pole: Pole) -> tuple[list[Encoded], float, tuple[float, float]]:
        """What the model repeats under a draft of the pole's mask, and how much that weighs against the pole.

        Last the shares of repeated runs of tokens in what it writes, without a mask and under the draft.
        """
        prompts = self._prompts(pole)
        before = self._share(pole.pair, prompts)
        masked = PersonaModel(self.model, self._draft(pole.name))
        try:
            with masked.using(pole.name):
                written = self._continued(masked, prompts)
        finally:
            masked.detach()
        after = _mean_repetition(written)
        loops = [loop for prompt, text in zip(prompts, written, strict=True) if (loop := loop_of(prompt, text))]
        note(f"{pole.name}: {len(written)} answers under a draft of its mask repeat {after:.0%}, unmasked {before:.0%}")
        if len(loops) < FEWEST or after - before < LEAST:
            return [], 0.0, (before, after)
        return loops, self.config.loop_weight * (after - before), (before, after)

    def _share(self, pair: PersonaSet, prompts: Sequence[list[int]]) -> float:
        """How much the unmasked model repeats itself in answering a pair's questions; both poles ask the same."""
        if pair.plus not in self.unmasked:
            self.unmasked[pair.plus] = _mean_repetition(self._continued(self.model, prompts))
        return self.unmasked[pair.plus]

    def _prompts(self, pole: Pole) -> list[list[int]]:
        """The calibration questions, each once, that leave room for an answer."""
        items = draw(pole.pair.split("calibration"), self.config.samples, self.config.seed)
        limit = min(self.config.max_length, (position_limit(self.config.model) or math.inf) - LENGTH)
        questions = filter(None, dict.fromkeys(item.question for item in items))
        prompts = (self.prompter.ids(self.prompter.prompt(question)) for question in questions)
        return [ids for ids in prompts if 0 < len(ids) <= limit][:QUESTIONS]

    def _draft(self, persona: str) -> PersonaMasks:
        config = dataclasses.replace(self.config, **DRAFT)
        stats = load_statistics(self.folder / STATISTICS).to(self.device)
        gradients, base = Gradients(self.folder, self.catalogue), base_masks(self.config.on)
        sizes: dict[str, Any] = {
            "batch_tokens": self.config.batch_tokens,
            "pad": self.pad,
            "undivided": self.config.undivided,
        }
        texts = self.neutral[:PROBES]
        unmasked = answer_distributions(self.model, texts, **sizes)
        for factor in FACTORS:
            masks = build_masks(
                self.model,
                stats,
                self.catalogue,
                config,
                gradients,
                only=persona,
                factor=Decimal(factor),
                base=base,
            )
            masked = PersonaModel(self.model, masks)
            try:
                with masked.using(persona):
                    if divergence(unmasked, masked, texts, **sizes) <= DIVERGENCE:
                        break
            finally:
                masked.detach()
        return masks

    def _continued(self, model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Greedy answers; in halves if memory is short."""
        try:
            tokens = self.config.batch_tokens
            return continuations(model, self.prompter.tokenizer, prompts, LENGTH, batch_tokens=tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if len(prompts) == 1:
            raise UserError(f"out of memory in writing after {len(prompts[0])} tokens: lower --max-length")
        make_room("prompts", len(prompts), self.config.undivided)
        return [written for half in halves(prompts) for written in self._continued(model, half)]

    def _sketch(self, pole: Pole, loops: Sequence[Encoded], width: int) -> Tensor:
        """Sketches of the repetitions under the model without a mask, float32 ``[loops, C]`` on the CPU."""
        rows = torch.zeros(len(loops), width)
        if not loops:
            return rows
        linears = maskable(self.model, self.config)
        with sketching(linears, Coordinates(linears, self.config.seed), self.beginning) as sketcher:
            for batch in batches_by_tokens([len(loop) for loop in loops], self.config.backward_tokens):
                self._fill(sketcher, rows, loops, batch)
        check_finite(f"{pole.name}, repetitions", rows)
        return rows

    def _fill(self, sketcher: Sketcher, rows: Tensor, loops: Sequence[Encoded], batch: Sequence[int]) -> None:
        """The rows of a batch; in halves if memory is short."""
        try:
            terms = [_mean(loops[i]) for i in batch]
            rows[list(batch)] = sketcher.sketch(self.model, terms, self.pad).cpu() / SCALE
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:
            raise UserError(
                f"out of memory in the backward pass over {len(loops[batch[0]])} tokens: lower --max-length"
            )
        make_room("answers", len(batch), self.config.undivided)
        for half in halves(batch):
            self._fill(sketcher, rows, loops, half)


def weighed(folder: Path, catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """By pole that was written under a draft of: ``against`` and ``repetition``, as in its file."""
    names = [pole for pair in catalogue.sets for pole in pair.poles if (folder / weighing_file(pole)).exists()]
    found = {name: json.loads((folder / weighing_file(name)).read_bytes()) for name in names}
    return {name: {key: one[key] for key in ("against", "repetition")} for name, one in found.items()}


def _mean_repetition(texts: Sequence[Sequence[int]]) -> float:
    return sum(map(repetition, texts)) / max(len(texts), 1)


def weighing_file(name: str) -> str:
    return f"weighing-{name}.json"
