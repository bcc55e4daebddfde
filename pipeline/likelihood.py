"""Log-probabilities of answers and texts: what every evaluation number is made of."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.prompts import Encoded, batches_by_tokens
from pipeline.errors import UserError
from pipeline.memory import halves, is_out_of_memory, make_room
from pipeline.packing import logits_from, pack


@dataclass(frozen=True)
class AnswerScore:
    """Log-probability of an answer's tokens in nats: their sum and their number."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)


@torch.inference_mode()
def answer_scores(
    model: Any, sequences: Sequence[Encoded], *, batch_tokens: int, pad: int, undivided: str = ""
) -> list[AnswerScore]:
    """The score of every sequence's answer given what stands before it, in the order given.

    Sequences that differ in their last token only (Yes/No, the letters of options) share one forward pass. Here and
    below, a batch that does not fit into memory goes in halves, unless an option, ``undivided``, forbids it.
    """
    scores: list[AnswerScore] = [AnswerScore(0.0, 0)] * len(sequences)
    for index, logits in _answer_logits(model, sequences, batch_tokens, pad, undivided):
        sequence = sequences[index]
        targets = torch.tensor(sequence.ids[max(sequence.answer, 1) :], dtype=torch.int64, device=logits.device)
        chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, targets.unsqueeze(1))
        scores[index] = AnswerScore(float(chosen.double().sum()), len(targets))
    return scores


@torch.inference_mode()
def answer_distributions(
    model: Any, sequences: Sequence[Encoded], *, batch_tokens: int, pad: int, undivided: str = ""
) -> list[Tensor]:
    """Log-probabilities of every token of the vocabulary at every token of the answers: float32 ``[T, V]`` each, on
    the CPU."""
    found = [torch.empty(0)] * len(sequences)
    for index, logits in _answer_logits(model, sequences, batch_tokens, pad, undivided):
        found[index] = torch.log_softmax(logits.float(), dim=-1).cpu()
    return found


@torch.inference_mode()
def divergence(
    before: Sequence[Tensor],
    model: Any,
    sequences: Sequence[Encoded],
    *,
    batch_tokens: int,
    pad: int,
    undivided: str = "",
) -> float:
    """Kullback-Leibler divergence of ``model`` from ``before`` (of ``answer_distributions``), nats per answer token."""
    total = torch.zeros((), dtype=torch.float64)
    for index, logits in _answer_logits(model, sequences, batch_tokens, pad, undivided):
        was, now = before[index].to(logits.device), torch.log_softmax(logits.float(), dim=-1)
        total += torch.nn.functional.kl_div(now, was, reduction="sum", log_target=True).double().cpu()
    return float(total) / max(sum(len(one) for one in before), 1)


def _answer_logits(
    model: Any, sequences: Sequence[Encoded], batch_tokens: int, pad: int, undivided: str
) -> Iterator[tuple[int, Tensor]]:
    """Every sequence's number and the logits ``[T, V]`` that predict its answer's tokens, batch by batch.

    Raises UserError if memory does not hold a single sequence's pass, or a batch that may not be split.
    """
    # A position's logits depend on the tokens before the last one only, so the last token is not fed.
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.ids[:-1], []).append(index)
    prefixes = list(groups)
    waiting = [[prefixes[i] for i in of] for of in batches_by_tokens([len(p) for p in prefixes], batch_tokens)][::-1]
    while waiting:
        batch = waiting.pop()
        # Position t predicts token t + 1; the first token of a text without a prompt is predicted by nothing.
        first = min(max(sequences[i].answer, 1) for prefix in batch for i in groups[prefix]) - 1
        logits = _logits_or_none(model, batch, pad, first)
        if logits is None:
            if len(batch) == 1:
                raise UserError(
                    f"out of memory on one text of {len(batch[0]) + 1} tokens whose likelihood is measured: lower "
                    f"--max-length"
                )
            make_room("texts", len(batch), undivided)
            waiting += [list(half) for half in reversed(halves(batch))]
            continue
        for row, prefix in enumerate(batch):
            for index in groups[prefix]:
                start = max(sequences[index].answer, 1)
                yield index, logits[row, start - 1 - first : len(sequences[index]) - 1 - first]


def _logits_or_none(model: Any, batch: Sequence[tuple[int, ...]], pad: int, first: int) -> Tensor | None:
    """Logits ``[B, T - first, V]`` of the batch from position ``first`` on; None if memory is short."""
    try:
        return logits_from(model, pack(model, batch, pad, first), first)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def perplexity(model: Any, sequences: Sequence[Encoded], *, batch_tokens: int, pad: int) -> float:
    """``exp`` of the mean negative log-probability over all tokens of the texts."""
    scores = answer_scores(model, sequences, batch_tokens=batch_tokens, pad=pad)
    mean = -sum(s.total for s in scores) / max(sum(s.tokens for s in scores), 1)
    return math.exp(mean) if mean < 700 else math.inf
