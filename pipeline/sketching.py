"""Gradients of single answers, known at random coordinates: enough to know their inner products.

A linear layer's gradient for one sequence is ``sum_t d_t x_t^T``, with x its input and d what comes back to its output:
an entry (i, j) costs T products, and no weight gradient is ever formed. One backward pass serves a whole batch, and
needs no gradient of any weight. What an answer's gradient owes to the tokens that all rows of its batch begin with (the
template's) is left out: they are passed once for all (``pipeline.packing``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.calibration import Stage, spread_threads
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.forms import NEUTRAL
from pipeline.errors import UserError
from pipeline.gradients import IDLE, SCALE, Step, backward_each
from pipeline.memory import halves, is_out_of_memory, make_room
from pipeline.objectives import Unit, WeightedAnswer
from pipeline.packing import Packed
from pipeline.sites import maskable, matrix
from pipeline.store import write_tensors
from pipeline.whitening import contrast_weights, standardised

COORDINATES = 1 << 17
"""Entries of all gradients together that are looked at. Inner products come out within one over the root of it of the
product of the lengths; 20,000 gave the same masks as two million (docs/experiments.md)."""

WEIGHTS = "answer-weights.safetensors"


class Coordinates:
    """``rows`` and ``columns`` of every linear's drawn entries, and ``places`` of theirs in a sketch of ``total``."""

    def __init__(self, linears: dict[str, Any], seed: int, count: int = COORDINATES) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = sum(module.weight.numel() for module in linears.values())
        self.rows, self.columns, self.places = {}, {}, {}
        self.total = 0
        for name, module in linears.items():
            shape = matrix(module).shape
            drawn = min(max(round(count * shape.numel() / weights), 1), shape.numel())
            device = module.weight.device
            self.rows[name] = torch.randint(shape[0], (drawn,), generator=generator).to(device)
            self.columns[name] = torch.randint(shape[1], (drawn,), generator=generator).to(device)
            self.places[name] = slice(self.total, self.total + drawn)
            self.total += drawn


class Sketcher:
    """Fills ``out`` with the sketches of a batch's answers while ``backward_each`` runs inside ``sketching``."""

    def __init__(self, coordinates: Coordinates) -> None:
        self.coordinates = coordinates
        self.out = torch.zeros(0)
        self.width = 0
        self.scattered: set[str] = set()

    def begin(self, packed: Packed) -> None:
        """Before the pass."""
        batch, self.width = packed.ids.shape
        self.out = torch.zeros(batch, self.coordinates.total, device=packed.ids.device)

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        rows, columns = self.coordinates.rows[name], self.coordinates.columns[name]
        place = self.coordinates.places[name]

        def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            x, batch = inputs[0].detach(), len(self.out)
            if not torch.is_grad_enabled():
                return None
            if x.shape[:-1].numel() != batch * self.width:
                # A choice of tokens (a routed expert): whose they are is not known here.
                self.scattered.add(name)
                return None
            if not output.requires_grad:
                # The graph begins at the first layers that are looked at. A copy: what follows may change it in place,
                # which a leaf does not allow.
                output = output.detach().requires_grad_(True).clone()
            read = x.reshape(batch, self.width, -1)[..., columns].float()

            def back(gradient: Tensor) -> None:
                returned = gradient.reshape(batch, self.width, -1)[..., rows].float()
                self.out[:, place] += (returned * read).sum(1)

            output.register_hook(back)
            return output

        return forward


@contextmanager
def sketching(linears: dict[str, Any], coordinates: Coordinates) -> Iterator[Sketcher]:
    """Hooks that sketch every backward pass inside; weights stay frozen."""
    sketcher = Sketcher(coordinates)
    handles = [module.register_forward_hook(sketcher.hook(name)) for name, module in linears.items()]
    try:
        yield sketcher
    finally:
        for handle in handles:
            handle.remove()


def single_answers(objectives: dict[str, list[Unit]]) -> dict[str, list[Unit]]:
    """What has to be sketched: every pair's answers of one pole, then of the other, and the neutral texts.

    Each is a unit of its own, the mean log-probability of its tokens. Neutral texts come first.
    """
    order = sorted((name for name, units in objectives.items() if _whitened(name, units)), key=lambda n: n != NEUTRAL)
    return {name: [(_mean(one),) for column in zip(*objectives[name], strict=True) for one in column] for name in order}


def weighted(objectives: dict[str, list[Unit]], folder: Path) -> dict[str, list[Unit]]:
    """The objectives with each answer weighted as ``SketchModule`` found best, and neutral texts beside them."""
    from safetensors.torch import load_file

    found, neutral = load_file(str(folder / WEIGHTS)), objectives[NEUTRAL]
    result = {}
    for name, units in objectives.items():
        if name == NEUTRAL or name not in found:
            result[name] = units
            continue
        weights, n = found[name].tolist(), len(units)
        plus, minus, rest = weights[:n], weights[n : 2 * n], weights[2 * n :]
        result[name] = [
            (_mean(unit[0], a), _mean(unit[1], b)) for unit, a, b in zip(units, plus, minus, strict=True)
        ] + [(_mean(unit[0], c),) for unit, c in zip(neutral, rest, strict=True)]
    return result


def _whitened(name: str, units: Sequence[Unit]) -> bool:
    """A set without an opponent has nothing to contrast; it keeps its likelihood."""
    return name == NEUTRAL or all(len(unit) == 2 for unit in units)


def _mean(answer: WeightedAnswer, weight: float = 1.0) -> WeightedAnswer:
    return WeightedAnswer(answer.encoded, weight / max(answer.tokens, 1))


class SketchModule(Stage):
    """Sketches every answer of ``objectives`` (of ``single_answers``) and writes the weights of all to ``folder``.

    Float64 ``[answers + neutral texts]`` by pair, in ``answer-weights.safetensors``. One pair's sketches are held at
    a time, beside those of the neutral texts: 4 bytes for each of the coordinates of each answer. The file is written
    at the end: what was begun begins again.
    """

    def __init__(self, config: CalibrateConfig, folder: Path, pad: int, sizes: dict[str, int]) -> None:
        super().__init__(config, folder)
        self.pad, self.sizes = pad, sizes
        self.weights: dict[str, Tensor] = {}
        self.neutral = self.rows = torch.zeros(0)

    def is_done(self) -> bool:
        return (self.folder / WEIGHTS).exists()

    def on_predict_start(self) -> None:
        if self.skipped:
            return
        spread_threads(self.trainer, self.device, self.config.deterministic)
        linears = maskable(self.model, self.config)
        self._context = sketching(linears, Coordinates(linears, self.config.seed))
        self.sketcher = self._context.__enter__()

    def predict_step(self, step: Step, batch_idx: int) -> None:
        if self.skipped:
            return
        if not len(self.rows):
            self.rows = torch.zeros(self.sizes[step.name], self.sketcher.coordinates.total, device=self.device)
        if step.terms:
            self._sketch(step.units, step.terms)
            self.tokens_done += sum(len(term.encoded) for term in step.terms)
        elif self.config.sharded:
            backward_each(self.model, [IDLE], self.pad, self.sketcher.begin)
        if step.last:
            self._finish(step.name)

    def _sketch(self, units: Sequence[int], terms: Sequence[WeightedAnswer]) -> None:
        """Fill the rows of ``units``, one answer each; in halves if memory is short: every answer is on its own."""
        try:
            backward_each(self.model, terms, self.pad, self.sketcher.begin)
            self.rows[list(units)] = self.sketcher.out / SCALE
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if len(terms) == 1:
            raise UserError(
                f"out of memory in the backward pass over one answer of {len(terms[0].encoded)} tokens: lower "
                f"--max-length"
            )
        make_room("answers", len(terms), self.config.undivided)
        for some, half in zip(halves(units), halves(terms), strict=True):
            self._sketch(some, half)

    def on_predict_end(self) -> None:
        if self.skipped:
            return
        self._context.__exit__(None, None, None)
        if self.trainer.is_global_zero:
            for name in sorted(self.sketcher.scattered):
                note(f"{name} reads a choice of tokens: not looked at in weighing the answers")
            write_tensors(self.folder / WEIGHTS, self.weights, {"coordinates": str(self.sketcher.coordinates.total)})
        # The others read the file next.
        self.trainer.strategy.barrier()

    def _finish(self, name: str) -> None:
        """One rank has filled each row; their sum is the whole."""
        rows, self.rows = self.rows, torch.zeros(0)
        if self.trainer.world_size > 1:
            dist.all_reduce(rows)
        bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"{name}: the gradient of answer {bad[0] + 1} of {len(rows)} is not finite")
        if name == NEUTRAL:
            self.neutral = rows
        elif self.trainer.is_global_zero:
            every = standardised(rows, self.neutral) / math.sqrt(rows.shape[1])
            self.weights[name] = contrast_weights((every @ every.T).cpu(), len(rows) // 2)
