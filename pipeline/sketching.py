"""Gradients of single answers, known at random coordinates: enough to know their inner products.

A linear layer's gradient for one sequence is ``sum_t d_t x_t^T``, with x its input and d what comes back to its output:
an entry (i, j) costs T products, and no weight gradient is ever formed. One backward pass serves a whole batch, and
is the one that the gradient of their mean needs anyway. What an answer's gradient owes to the tokens that all rows of
its batch begin with (the template's) is not known, as they are passed once for all (``pipeline.packing``); so what all
answers of a run begin with is left out, whatever the batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.experts import experts_forward, plain_product
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.forms import NEUTRAL
from pipeline.errors import UserError
from pipeline.experts import ExpertMatrix, by_module
from pipeline.gradients import IDLE, SCALE, GradientModule, Step, backward_each
from pipeline.objectives import Unit, WeightedAnswer
from pipeline.packing import Packed, common
from pipeline.sites import matrix
from pipeline.store import write_tensors

COORDINATES = 1 << 17
"""Entries of all gradients together that are looked at. Inner products come out within one over the root of it of the
product of the lengths; 20,000 gave the same masks as two million (docs/experiments.md)."""

SKETCHES = "sketches"
"""What a sketch's file calls them."""


class Coordinates:
    """``rows`` and ``columns`` of every linear's drawn entries, and ``places`` of theirs in a sketch of ``total``."""

    def __init__(self, linears: dict[str, Any], seed: int, count: int = COORDINATES) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = sum(matrix(layer).numel() for layer in linears.values())
        self.rows, self.columns, self.places = {}, {}, {}
        self.total = 0
        for name, layer in linears.items():
            weight = matrix(layer)
            shape, device = weight.shape, weight.device
            drawn = min(max(round(count * shape.numel() / weights), 1), shape.numel())
            self.rows[name] = torch.randint(shape[0], (drawn,), generator=generator).to(device)
            self.columns[name] = torch.randint(shape[1], (drawn,), generator=generator).to(device)
            self.places[name] = slice(self.total, self.total + drawn)
            self.total += drawn


class Sketcher:
    """Sketches answers inside ``sketching``, but for what they owe to their first ``beginning`` tokens."""

    def __init__(self, coordinates: Coordinates, beginning: int) -> None:
        self.coordinates, self.beginning = coordinates, beginning
        self.scattered: set[str] = set()
        self._out = torch.zeros(0)
        self._width = self._from = 0

    def sketch(self, model: Any, batch: Sequence[WeightedAnswer], pad: int, share: float = 1.0) -> Tensor:
        """Differentiate the mean over a batch, as ``backward`` does, with a row for each answer.

        Returns float32 ``[B, C]``, what each answer adds to the drawn entries of the gradient.
        """
        try:
            backward_each(model, batch, pad, share, self.beginning, self._begin)
            return self._out
        finally:
            self._width = 0

    def _begin(self, packed: Packed) -> None:
        batch, self._width = packed.ids.shape
        self._from = self.beginning - packed.skipped
        self._out = torch.zeros(batch, self.coordinates.total, device=packed.ids.device)

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        rows, columns, place = self._drawn(name)

        def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            # What a model computes without gradients (a cycle before the last, a choice of tokens) has none to look at.
            if not self._width or not torch.is_grad_enabled():
                return None
            x, out, width, start = inputs[0].detach(), self._out, self._width, self._from
            if x.shape[:-1].numel() != len(out) * width:
                # A choice of tokens (a routed expert): whose they are is not known here.
                self.scattered.add(name)
                return None
            output = _looked_at(output)
            read = x.reshape(len(out), width, -1)[:, start:, columns].float()

            def back(gradient: Tensor) -> None:
                returned = gradient.reshape(len(out), width, -1)[:, start:, rows].float()
                out[:, place] += (returned * read).sum(1)

            output.register_hook(back)
            return output

        return forward

    def experts_forward(self, experts: Any, layers: dict[str, ExpertMatrix]) -> Callable[..., Tensor]:
        """The forward of an experts module, expert by expert: which tokens each reads is known only so."""
        names = {(layer.parameter, layer.expert): name for name, layer in layers.items()}

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            plain, out, width, start = plain_product(experts), self._out, self._width, self._from
            if width and len(hidden_states) != len(out) * width:
                self.scattered |= layers.keys()
                width = 0

            def product(parameter: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
                output, name = plain(parameter, expert, x, tokens), names.get((parameter, expert))
                if name is None or not width or not torch.is_grad_enabled():
                    return output
                output = _looked_at(output)
                rows, columns, place = self._drawn(name)
                behind = tokens % width >= start
                read, sequence = x.detach()[behind][:, columns].float(), tokens[behind] // width

                def back(gradient: Tensor) -> None:
                    out[:, place].index_add_(0, sequence, gradient[behind][:, rows].float() * read)

                output.register_hook(back)
                return output

            return experts_forward(experts, hidden_states, top_k_index, top_k_weights, product)

        return forward

    def _drawn(self, name: str) -> tuple[Tensor, Tensor, slice]:
        return self.coordinates.rows[name], self.coordinates.columns[name], self.coordinates.places[name]


@contextmanager
def sketching(linears: dict[str, Any], coordinates: Coordinates, beginning: int) -> Iterator[Sketcher]:
    """The hooks of a ``Sketcher`` on ``linears``."""
    sketcher = Sketcher(coordinates, beginning)
    handles, changed = [], []
    try:
        for name, layer in linears.items():
            if isinstance(layer, nn.Module):
                handles.append(layer.register_forward_hook(sketcher.hook(name)))
        for experts, layers in by_module(linears):
            experts.forward = sketcher.experts_forward(experts, layers)  # type: ignore[method-assign]
            changed.append(experts)
        yield sketcher
    finally:
        for handle in handles:
            handle.remove()
        for experts in changed:
            del experts.forward


def _looked_at(output: Tensor) -> Tensor:
    """With a gradient to come. The graph begins at the first layers that are looked at: there it is a copy, as what
    follows may change it in place, which a leaf does not allow."""
    return output if output.requires_grad else output.detach().requires_grad_(True).clone()


class SketchedGradients(GradientModule):
    """``GradientModule`` that sketches every answer of the pairs and of neutral text in the same backward pass.

    Float32 ``[answers, C]`` by objective under ``SKETCHES`` in ``sketch_file(name)``: the gradient of each answer's
    mean log-probability at the drawn coordinates; of a pair all answers of one pole, then of the other. One
    objective's are held at a time. A set without an opponent has nothing to contrast, and none.
    """

    def __init__(self, config: CalibrateConfig, folder: Path, pad: int, objectives: dict[str, list[Unit]]) -> None:
        super().__init__(config, folder, pad, objectives)
        self.beginning = beginning_of(objectives)
        self.sizes: dict[str, int] = {}
        # By identity: two items may be alike.
        self.rows: dict[int, int] = {}
        for name, units in objectives.items():
            if is_sketched(name, units):
                answers = [answer for column in zip(*units, strict=True) for answer in column]
                self.sizes[name] = len(answers)
                self.rows |= {id(answer): row for row, answer in enumerate(answers)}
        self.sketches = torch.zeros(0)

    def on_predict_start(self) -> None:
        super().on_predict_start()
        if not self.skipped:
            self._sketching = sketching(self.linears, Coordinates(self.linears, self.config.seed), self.beginning)
            self.sketcher = self._sketching.__enter__()

    def predict_step(self, step: Step, batch_idx: int) -> None:
        at_work = not self.skipped and step.name not in self.finished
        if at_work and step.name in self.sizes and not len(self.sketches):
            self.sketches = torch.zeros(self.sizes[step.name], self.sketcher.coordinates.total, device=self.device)
        super().predict_step(step, batch_idx)

    def _backward(self, terms: Sequence[WeightedAnswer], share: float) -> None:
        if not len(self.sketches):
            super()._backward(terms, share)
            return
        found = self.sketcher.sketch(self.model, terms, self.pad, share)
        for term, row in zip(terms, found, strict=True):
            if term is not IDLE and term.tokens:
                self.sketches[self.rows[id(term)]] = row * (share / (SCALE * term.weight * term.tokens))

    def on_predict_end(self) -> None:
        if not self.skipped:
            self._sketching.__exit__(None, None, None)
            if self.trainer.is_global_zero:
                for name in sorted(self.sketcher.scattered):
                    note(f"{name} reads a choice of tokens: not looked at in weighing the answers")
        super().on_predict_end()

    def _finish(self, name: str) -> None:
        """The gradient's file comes last: it says that the objective is finished."""
        sketches, self.sketches = self.sketches, torch.zeros(0)
        if len(sketches):
            # One rank has filled each row; their sum is the whole.
            if self.trainer.world_size > 1:
                dist.all_reduce(sketches)
            check_finite(name, sketches)
            if self.trainer.is_global_zero:
                write_tensors(self.folder / sketch_file(name), {SKETCHES: sketches}, {})
        super()._finish(name)


def beginning_of(objectives: dict[str, list[Unit]]) -> int:
    """With how many tokens all answers' texts begin alike, none of which predicts an answer's token."""
    answers = [answer.encoded for units in objectives.values() for unit in units for answer in unit]
    most = min((max(answer.answer, 1) - 1 for answer in answers), default=0)
    return common([answer.ids for answer in answers], most)


def is_sketched(name: str, units: Sequence[Unit]) -> bool:
    """Does the objective have answers to contrast, or is it what they are held against?"""
    return name == NEUTRAL or all(len(unit) == 2 for unit in units)


def check_finite(name: str, sketches: Tensor) -> None:
    """Raise UserError with the number of the first answer whose gradient has NaN or infinity."""
    bad = (~torch.isfinite(sketches).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{name}: the gradient of answer {bad[0] + 1} of {len(sketches)} is not finite")


def sketch_file(name: str) -> str:
    return f"sketch-{name}.safetensors"
