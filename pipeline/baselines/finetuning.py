"""Fine-tuning on the calibration answers: what training reaches, which a mask does without.

Low-rank adaptation (Hu et al., arXiv 2106.09685) by peft, on the likelihood of the persona's own answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.prompts import Encoded, batches_by_tokens
from pipeline.errors import UserError
from pipeline.gradients import backward
from pipeline.objectives import WeightedAnswer
from pipeline.sites import is_transposed

BATCH = 8
"""Answers per step of the optimizer."""


@dataclass(frozen=True)
class Adapter:
    """What is added to the weights ``[N, K]`` of layers: ``factors[layer]`` is up ``[N, r]``, scaled, and down
    ``[r, K]``. ``losses`` are the mean nats per token of the answers, epoch by epoch, while they were learnt."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    losses: tuple[float, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.factors.values() for t in pair)


def fine_tune(
    model: Any,
    answers: Sequence[Encoded],
    layers: Sequence[str],
    *,
    rank: int,
    epochs: int,
    rate: float,
    seed: int,
    batch_tokens: int,
    pad: int,
) -> Adapter:
    """Train adapters of ``layers`` on the answers, with Adam; ``model`` is used up.

    An answer counts by the mean over its tokens, as everywhere else. Raises UserError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--conditions lora needs peft: pip install 'persona-subnetworks[lora]'") from error

    if any(one.answer >= len(one) for one in answers):
        raise UserError("a calibration answer has no token left to learn; raise --max-length")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transposed = any(is_transposed(model.get_submodule(name)) for name in layers)
        options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), fan_in_fan_out=transposed)
        model = inject_adapter_in_model(options, model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # What `backward` differentiates is to be raised.
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, maximize=True)
        losses = [_epoch(model, optimizer, answers, batch_tokens, pad) for _ in range(epochs)]
    return Adapter(dict(_factors(model, layers)), tuple(losses))


def _epoch(model: Any, optimizer: Any, answers: Sequence[Encoded], batch_tokens: int, pad: int) -> float:
    """One pass over the answers in random order; their mean nats per token."""
    total, order = 0.0, torch.randperm(len(answers)).tolist()
    for start in range(0, len(order), BATCH):
        batch = [answers[i] for i in order[start : start + BATCH]]
        optimizer.zero_grad()
        for chosen in batches_by_tokens([len(one) for one in batch], batch_tokens):
            terms = [WeightedAnswer(batch[i], 1 / (len(batch[i]) - max(batch[i].answer, 1))) for i in chosen]
            total -= backward(model, terms, pad, len(batch))
        optimizer.step()
    return total / len(answers)


def _factors(model: Any, layers: Sequence[str]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name in layers:
        module = model.get_submodule(name)
        ((adapter, scale),) = module.scaling.items()
        yield name, (scale * module.lora_B[adapter].weight.detach(), module.lora_A[adapter].weight.detach())


@contextmanager
def adapted(model: Any, adapter: Adapter | None) -> Iterator[None]:
    """The weights of a ``PersonaModel`` with the adapter merged in, for a block; bit for bit as before after it.

    Holds a copy of the adapted weights meanwhile.
    """
    factors = adapter.factors if adapter else {}
    kept = {name: model.weight(name).clone() for name in factors}
    try:
        with torch.no_grad():
            for name, (up, down) in factors.items():
                model.weight(name).add_((up @ down).to(kept[name]))
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.weight(name).copy_(weight)
