"""How much each calibration answer counts, for every pole, and what the masked model repeats among them.

A mask chosen by a pair's answers alone can make the model repeat itself. What it repeats under a draft of a pole's mask
(``pipeline.drafts``) is a third group of texts in the discriminant (``pipeline.whitening``), which the pole's direction
turns away from.

A pair's answers may differ in more than the pair: statements that suit a bold persona are also said in a bold tone.
The margins of the run's other pairs, which share the tone, are then left alone as neutral texts are (``--apart``), and
so is that of Yes over No (``--apart-yes-no``).
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.calibration import Stage, spread_threads
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue, PersonaSet
from pipeline.data.forms import NEUTRAL
from pipeline.data.prompts import Encoded, Prompter, batches_by_tokens
from pipeline.drafts import Drafts
from pipeline.gradient_files import weighing_file
from pipeline.gradients import backward_tokens
from pipeline.loops import as_json, from_json
from pipeline.memory import in_halves
from pipeline.objectives import Unit, WeightedAnswer
from pipeline.repetitions import Repeated
from pipeline.sites import maskable
from pipeline.sketching import (
    SCALE,
    SKETCHES,
    Coordinates,
    beginning_of,
    check_finite,
    is_sketched,
    sketch_file,
    sketching,
)
from pipeline.store import write_json
from pipeline.whitening import standardised, weights_beside
from pipeline.yes_no import yes_no_of

NOTHING = Repeated([], 0.0, 0.0)
SECOND = 0.5
"""What a mask repeats is turned away from as strongly as if a draft repeated so much more, however much it is."""
MUCH_THE_SAME = 0.5
"""Pairs that leave less of a pole's contrast than this are asked about."""


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
    loops = [from_json(one) for one in found["loops"]]
    weights, n = found["weights"], len(pole.own)
    pairs = zip(pole.own, pole.other, weights[:n], weights[n : 2 * n], strict=True)
    units: list[Unit] = [(_mean(a.encoded, c), _mean(b.encoded, d)) for a, b, c, d in pairs]
    texts = [*loops, *(unit[0].encoded for unit in neutral)]
    return units + [(_mean(text, c),) for text, c in zip(texts, weights[2 * n :], strict=True)]


def _mean(answer: Encoded, weight: float = 1.0) -> WeightedAnswer:
    return WeightedAnswer(answer, weight / max(WeightedAnswer(answer, 1.0).tokens, 1))


class WeighingModule(Stage):
    """Finds the weights of every pole's answers and writes them to ``weighing_file(name)`` in ``target``, by default
    the run's ``folder``.

    ``poles``: of all pairs; only those in ``seen`` are weighed, if it is given: by pole, what the model repeats under
    its finished mask (``pipeline.revising``). Without it, drafts are made.

    JSON: ``weights`` of its own answers, its opponent's, the repetitions and the neutral texts, in this order;
    ``loops``, the repetitions as token ids with the place where the answer begins and their text; ``against``, what
    they weigh; ``repetition``, the share of repeated runs of three tokens in what was written without a mask and
    under the first draft, or the mask; ``apart``, what other margins weigh, by the name of their pair's first pole;
    ``held``, how much of the contrast is left beside them at the same change of the model, in [0, 1]. Rank r takes
    every world-th pole from r on; what an earlier process wrote stays.
    """

    def __init__(
        self,
        config: CalibrateConfig,
        folder: Path,
        catalogue: Catalogue,
        prompter: Prompter,
        poles: Sequence[Pole],
        objectives: dict[str, list[Unit]],
        target: Path | None = None,
        seen: Mapping[str, Repeated] | None = None,
    ) -> None:
        super().__init__(config, folder)
        self.target, self.seen = target or folder, seen
        self.catalogue, self.prompter = catalogue, prompter
        self.poles = {pole.name: pole for pole in poles if seen is None or pole.name in seen}
        self.pairs = tuple(dict.fromkeys(pole.pair.plus for pole in poles))
        self.objectives = frozenset(objectives)
        self.neutral = [unit[0].encoded for unit in objectives[NEUTRAL]]
        self.beginning = beginning_of(objectives)
        self.pad = prompter.tokenizer.pad_token_id
        self.margins: dict[str, tuple[Tensor, float]] = {}

    def is_done(self) -> bool:
        return all((self.target / weighing_file(name)).exists() for name in self.poles)

    def load(self) -> None:
        # Without repetitions there is nothing to write, and the sketches say all.
        if self.config.loop_weight:
            super().load()

    def on_predict_start(self) -> None:
        if not self.skipped:
            spread_threads(self.trainer, self.device, self.config.deterministic)
            run = self.config, self.folder, self.catalogue, self.prompter
            if self.seen is None:
                self.drafts = Drafts(self.model, *run, self.neutral, self.device, self.base)
            names = [
                *(self.pairs if self.config.apart else ()),
                *filter(self.objectives.__contains__, map(yes_no_of, self.pairs)),
            ]
            self.margins = {name: self._margin(name) for name in names}

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.dealt([[name] for name in self.poles])

    def predict_step(self, name: str | None, batch_idx: int) -> None:
        if name is None or self.skipped or (self.target / weighing_file(name)).exists():
            return
        pole = self.poles[name]
        found = self._repeated(pole)
        against = self.config.loop_weight * (found.excess if self.seen is None else SECOND)
        answers, neutral = (self._sketches(name) for name in (pole.pair.plus, NEUTRAL))
        own, other = answers.chunk(2) if name == pole.pair.plus else answers.chunk(2)[::-1]
        beside = {one: known for one, known in self.margins.items() if self._is_beside(one, pole.pair.plus)}
        loops = self._sketch(name, found.loops, answers.shape[1])
        every = standardised(own, other, loops, neutral, beside=[margin for margin, _ in beside.values()])
        every /= math.sqrt(every.shape[1])
        weights, held = weights_beside(every @ every.T, len(beside), len(own), len(loops), against=against)
        texts = len(every) - len(beside)
        times = [times for _, times in beside.values()]
        apart = {one: float(w) * n for one, w, n in zip(beside, weights[texts:], times, strict=True)}
        decode = self.prompter.tokenizer.decode
        content = {
            "weights": weights[:texts].tolist(),
            "against": against,
            "repetition": [found.unmasked, found.masked],
            "loops": [{**as_json(loop), "text": decode(loop.ids[loop.answer :])} for loop in found.loops],
            "apart": apart,
            "held": held,
        }
        write_json(self.target / weighing_file(name), content)
        if beside:
            much = ""
            if held < MUCH_THE_SAME:
                alone = [*beside] == [yes_no_of(pole.pair.plus)]
                much = "; is there more to it than Yes and No?" if alone else "; is one of them the same persona?"
            note(f"{name}: keeps {held:.0%} of its contrast apart from {', '.join(beside)}{much}")

    def on_predict_end(self) -> None:
        # The others read the files next.
        self.trainer.strategy.barrier("answers weighed")

    def _repeated(self, pole: Pole) -> Repeated:
        if self.seen is not None:
            return self.seen[pole.name]
        return self.drafts.repeated(pole.pair, pole.name) if self.config.loop_weight else NOTHING

    def _is_beside(self, name: str, plus: str) -> bool:
        """Is the margin ``name`` one that the pair of ``plus`` leaves alone? Of Yes and No, its own questions' is."""
        return name == yes_no_of(plus) or (name != plus and name in self.pairs)

    def _sketches(self, name: str) -> Tensor:
        return load_file(str(self.folder / sketch_file(name)))[SKETCHES]

    def _margin(self, name: str) -> tuple[Tensor, float]:
        """A pair's margin as it counts for other pairs, ``[C]``, and how many times itself that is: as much as its
        items would, were each a text to leave alone."""
        own, other = self._sketches(name).chunk(2)
        times = math.sqrt(len(own))
        return (own.mean(0) - other.mean(0)) * times, times

    def _sketch(self, name: str, loops: Sequence[Encoded], width: int) -> Tensor:
        """Sketches of the repetitions under the model without a mask, float32 ``[loops, C]`` on the CPU."""
        rows = torch.zeros(len(loops), width)
        if not loops:
            return rows
        linears = maskable(self.model, self.config)
        batches = batches_by_tokens([len(loop) for loop in loops], backward_tokens(self.config.batch_tokens))
        with sketching(linears, Coordinates(linears, self.config.seed), self.beginning) as sketcher:

            def sketch(some: Sequence[Encoded]) -> list[Tensor]:
                return list(sketcher.sketch(self.model, [_mean(loop) for loop in some], self.pad).cpu() / SCALE)

            for batch in batches:
                found = in_halves(
                    sketch,
                    [loops[i] for i in batch],
                    "answers",
                    lambda loop: f"in the backward pass over {len(loop)} tokens",
                    self.config.undivided,
                )
                rows[list(batch)] = torch.stack(found)
        check_finite(f"{name}, repetitions", rows)
        return rows


def recorded(folder: Path, catalogue: Catalogue, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For the manifest, by pole that has a direction of its own, what its file says under ``keys``."""
    names = [pole for pair in catalogue.sets for pole in pair.poles if (folder / weighing_file(pole)).exists()]
    found = {name: json.loads((folder / weighing_file(name)).read_bytes()) for name in names}
    return {name: {key: one[key] for key in keys} for name, one in found.items()}
