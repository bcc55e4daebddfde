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
    """The score of every sequence's answer given what stands before it, in the order given.

    Sequences that differ in their last token only (Yes/No, the letters of options) share one forward pass.
    """
    # A position's logits depend on the tokens before the last one only, so the last token is not fed.
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.ids[:-1], []).append(index)
    prefixes = list(groups)
    scores: list[AnswerScore] = [AnswerScore(0.0, 0)] * len(sequences)
    device = model.get_input_embeddings().weight.device
    for chosen in batches_by_tokens([len(p) for p in prefixes], batch_tokens):
        batch = [prefixes[i] for i in chosen]
        width = max(len(batch[0]), 1)
        ids = torch.full((len(batch), width), pad, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for row, prefix in enumerate(batch):
            ids[row, : len(prefix)] = torch.tensor(prefix)
            attention[row, : len(prefix)] = 1
        # Position t predicts token t + 1; the first token of a text without a prompt is predicted by nothing.
        first = min(max(sequences[i].answer, 1) for prefix in batch for i in groups[prefix]) - 1
        logits = _logits_from(model, ids.to(device), attention.to(device), min(first, width - 1))
        for row, prefix in enumerate(batch):
            for index in groups[prefix]:
                scores[index] = _score(logits[row], sequences[index], first)
    return scores


def _score(logits: Tensor, sequence: Encoded, first: int) -> AnswerScore:
    """``logits`` ``[T', V]`` begin at position ``first``."""
    start = max(sequence.answer, 1)
    targets = torch.tensor(sequence.ids[start:], dtype=torch.int64, device=logits.device)
    own = logits[start - 1 - first : len(sequence) - 1 - first].float()
    chosen = torch.log_softmax(own, dim=-1).gather(1, targets.unsqueeze(1))
    return AnswerScore(float(chosen.double().sum()), len(targets))


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
