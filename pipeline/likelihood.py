"""Log-probabilities of answers and texts: what every evaluation number is made of."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.prompts import Encoded, batches_by_tokens


@dataclass(frozen=True)
class AnswerScore:
    """Log-probability of an answer's tokens in nats: their sum and their number."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)


@torch.inference_mode()
def answer_scores(model: Any, sequences: Sequence[Encoded], *, batch_tokens: int, pad: int) -> list[AnswerScore]:
    """The score of every sequence's answer given what stands before it, in the order given."""
    scores: list[AnswerScore] = [AnswerScore(0.0, 0)] * len(sequences)
    for indices in batches_by_tokens([len(s) for s in sequences], batch_tokens):
        batch = [sequences[i] for i in indices]
        width = len(batch[0])
        ids = torch.full((len(batch), width), pad, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.tensor(sequence.ids)
            attention[row, : len(sequence)] = 1
        device = model.get_input_embeddings().weight.device
        starts = [max(s.answer, 1) for s in batch]
        first = min(starts) - 1
        logits = _logits_from(model, ids.to(device), attention.to(device), first)
        for row, (index, sequence) in enumerate(zip(indices, batch, strict=True)):
            # Position t predicts token t + 1; the first token of a text without a prompt is predicted by nothing.
            targets = torch.tensor(sequence.ids[starts[row] :], device=device)
            own = logits[row, starts[row] - 1 - first : len(sequence) - 1 - first].float()
            chosen = torch.log_softmax(own, dim=-1).gather(1, targets.unsqueeze(1))
            scores[index] = AnswerScore(float(chosen.double().sum()), len(targets))
    return scores


def perplexity(model: Any, sequences: Sequence[Encoded], *, batch_tokens: int, pad: int) -> float:
    """``exp`` of the mean negative log-probability over all tokens of the texts."""
    scores = answer_scores(model, sequences, batch_tokens=batch_tokens, pad=pad)
    mean = -sum(s.total for s in scores) / max(sum(s.tokens for s in scores), 1)
    return math.exp(mean) if mean < 700 else math.inf


def _logits_from(model: Any, ids: Tensor, attention: Tensor, first: int) -> Tensor:
    """Logits ``[B, T - first, V]`` of the positions from ``first`` on: the output head is the costliest layer."""
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**options, logits_to_keep=ids.shape[1] - first).logits
    return model(**options).logits[:, first:]
