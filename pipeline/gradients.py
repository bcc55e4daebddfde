"""Gradient of the answer margin with respect to every linear weight: one backward pass, nothing is updated.

The margin of a pair of personas is the mean over items of ``mean log p(answer of +) - mean log p(answer
of -)`` in nats per token. Removing weight ij changes it by about ``-W_ij g_ij``.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.calibration import DTYPES, spread_threads
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue, PersonaSet
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter, batches_by_tokens
from pipeline.loading import load_model
from pipeline.sites import find_linears, matrix
from pipeline.store import write_tensors


@dataclass(frozen=True)
class WeightedAnswer:
    """A sequence and the factor of its answer's summed log-probability in the objective."""

    encoded: Encoded
    weight: float


def margin_objective(plus: Sequence[Encoded], minus: Sequence[Encoded]) -> list[WeightedAnswer]:
    """The terms of the margin: ``+-1 / (items * answer tokens)``. Item i is ``plus[i]`` against ``minus[i]``."""
    terms = []
    for sign, answers in ((1.0, plus), (-1.0, minus)):
        for encoded in answers:
            tokens = len(encoded) - max(encoded.answer, 1)
            terms.append(WeightedAnswer(encoded, sign / (len(answers) * max(tokens, 1))))
    return terms


@contextmanager
def accumulating(linears: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Float32 sums of the gradients of all backward passes inside, by layer, in the weight's own layout.

    One sum the size of the weights is held; a layer's gradient is added and freed as soon as it is known.
    """
    sums = {name: torch.zeros_like(module.weight, dtype=torch.float32) for name, module in linears.items()}
    handles = []

    def adder(total: Tensor):
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad)
            parameter.grad = None

        return add

    for name, module in linears.items():
        weight: Any = module.weight
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(adder(sums[name])))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for module in linears.values():
            module.weight.requires_grad_(False)


def backward(model: Any, batch: Sequence[WeightedAnswer], pad: int) -> float:
    """Add the gradient of one right-padded batch; returns its part of the objective."""
    device = model.get_input_embeddings().weight.device
    width = max(len(term.encoded) for term in batch)
    ids = torch.full((len(batch), width), pad, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, term in enumerate(batch):
        ids[row, : len(term.encoded)] = torch.tensor(term.encoded.ids)
        attention[row, : len(term.encoded)] = 1
    first = min(max(term.encoded.answer, 1) for term in batch) - 1
    options: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": attention.to(device), "use_cache": False}
    with torch.inference_mode(False), torch.enable_grad():
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(**options, logits_to_keep=width - first).logits
        else:
            logits = model(**options).logits[:, first:]
        objective = torch.zeros((), device=device)
        for row, term in enumerate(batch):
            start = max(term.encoded.answer, 1)
            targets = torch.tensor(term.encoded.ids[start:], device=device)
            own = logits[row, start - 1 - first : len(term.encoded) - 1 - first].float()
            objective = objective + term.weight * torch.log_softmax(own, -1).gather(1, targets.unsqueeze(1)).sum()
        objective.backward()
    return float(objective.detach())


class Step:
    """One batch of one pair; ``last`` marks the pair's end, where the sums are complete.

    Not a dataclass: Lightning's precision plugins rebuild those, and these hold nothing to convert.
    """

    def __init__(self, pair: int, batch: list[WeightedAnswer], last: bool) -> None:
        self.pair, self.batch, self.last = pair, batch, last


class MarginData(lightning.LightningDataModule):
    """The terms of every pair's margin, pair after pair, so that one gradient at a time is held.

    Each pair's batches are formed once and dealt out whole; ranks with fewer get empty steps.
    """

    def __init__(self, pairs: Sequence[Sequence[WeightedAnswer]], batch_tokens: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.batches = [batches_by_tokens([len(t.encoded) for t in terms], batch_tokens) for terms in pairs]

    def steps(self, rank: int, world: int) -> list[Step]:
        """The steps of one rank; all ranks have equally many of every pair."""
        steps = []
        for pair, (terms, batches) in enumerate(zip(self.pairs, self.batches, strict=True)):
            count = -(-len(batches) // world)
            mine = batches[rank::world]
            for number in range(count):
                chosen = [terms[i] for i in mine[number]] if number < len(mine) else []
                steps.append(Step(pair, chosen, number == count - 1))
        return steps

    def transfer_batch_to_device(self, batch: Step, device: torch.device, dataloader_idx: int) -> Step:
        return batch

    def predict_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        steps = self.steps(self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(steps, batch_size=None, collate_fn=lambda step: step)  # type: ignore[arg-type]


class GradientModule(lightning.LightningModule):
    """Writes the margin gradient of every pair to ``folder / gradient_file(pair)``, float32 ``[N, K]`` by layer."""

    def __init__(self, config: CalibrateConfig, folder: Path, pad: int) -> None:
        super().__init__()
        self.config, self.folder, self.pad = config, folder, pad
        self.model: Any = None
        self.tokens_done = 0

    def configure_model(self) -> None:
        if self.model is None:
            self.model = load_model(self.config.model, DTYPES.get(self.config.precision, torch.float32))

    def on_predict_start(self) -> None:
        spread_threads(self.trainer, self.device)
        self.linears = find_linears(self.model, self.config.include, self.config.exclude)
        self._context = accumulating(self.linears)
        self.sums = self._context.__enter__()

    def predict_step(self, step: Step, batch_idx: int) -> None:
        if step.batch:
            backward(self.model, step.batch, self.pad)
            self.tokens_done += sum(len(term.encoded) for term in step.batch)
        if step.last:
            self._finish(step.pair)

    def on_predict_end(self) -> None:
        self._context.__exit__(None, None, None)

    def _finish(self, pair: int) -> None:
        if self.trainer.world_size > 1:
            for total in self.sums.values():
                dist.all_reduce(total)
        if self.trainer.is_global_zero:
            gradients = {
                n: s.T if matrix(self.linears[n]) is not self.linears[n].weight else s for n, s in self.sums.items()
            }
            write_tensors(self.folder / gradient_file(pair), gradients, {"pair": str(pair)})
        for total in self.sums.values():
            total.zero_()


def gradient_file(pair: int) -> str:
    return f"gradient-{pair}.safetensors"


def margin_terms(
    personas: PersonaSet, prompter: Prompter, *, count: int, max_length: int, seed: int
) -> list[WeightedAnswer]:
    """The margin's terms for one pair: the same items that the statistics are measured on."""
    plus, minus = [], []
    for item in draw(personas.split("calibration"), count, seed):
        assert item.other is not None
        pair = [prompter.encode(item.question, answer) for answer in (item.matching, item.other)]
        if all(encoded.answer < max_length and len(encoded) > 1 for encoded in pair):
            first, second = (Encoded(e.ids[:max_length], e.answer, e.question) for e in pair)
            plus.append(first)
            minus.append(second)
    return margin_objective(plus, minus)


class Gradients:
    """The gradients in a folder, read layer by layer, for any persona of a catalogue.

    The gradient of a pole is that of its pair with its sign; margins add, so the gradient of a composed
    persona is the weighted sum of its parts'.
    """

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder = folder
        self._parts: dict[str, list[tuple[int, float]]] = {}
        for index, personas in enumerate(catalogue.sets):
            for pole, sign in zip(personas.poles, (1.0, -1.0), strict=False):
                self._parts[pole] = [(index, sign)]
        for composition in catalogue.compositions:
            parts = composition.parts
            total = sum(weight for _, weight in parts)
            self._parts[composition.name] = [(i, s * w / total) for p, w in parts for i, s in self._parts[p]]

    def of(self, persona: str, layer: str) -> Tensor:
        """Float32 ``[N, K]``."""
        return torch.stack([weight * self._read(index, layer) for index, weight in self._parts[persona]]).sum(0)

    def _read(self, index: int, layer: str) -> Tensor:
        with safe_open(str(self.folder / gradient_file(index)), "pt") as file:
            return file.get_tensor(layer)
