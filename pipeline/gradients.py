"""Gradient of the answer margin with respect to every linear weight: one backward pass, nothing is updated.

The margin of a pair of personas is the mean over items of ``mean log p(answer of +) - mean log p(answer
of -)`` in nats per token. Removing weight ij changes it by about ``-W_ij g_ij``.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.prompts import Encoded


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
def accumulating(linears: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
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
