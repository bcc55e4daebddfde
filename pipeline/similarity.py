"""How alike a model's inner states are under two masks, block by block (paper: T. 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.prompts import Encoded, batches_by_tokens


@dataclass(frozen=True)
class Similarity:
    """Two states of a model after ``layer`` (0: the embeddings, n: block n - 1; after the last, its final norm too).

    ``cosine`` and ``distance`` are means over sequences: of the cosine of the two vectors, and of the length of their
    difference over the length of the first. ``cka`` is the linear CKA of the two sets of vectors, in [0, 1].
    """

    layer: int
    cosine: float
    distance: float
    cka: float


@torch.inference_mode()
def last_states(model: Any, sequences: Sequence[Encoded], *, batch_tokens: int, pad: int) -> Tensor:
    """The hidden states at the last position of every sequence, float64 ``[layers + 1, B, D]``, on the CPU."""
    device = model.get_input_embeddings().weight.device
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for chosen in batches_by_tokens([len(s) for s in sequences], batch_tokens):
        width = max(len(sequences[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            length = len(sequences[index])
            ids[row, :length] = torch.tensor(sequences[index].ids)
            attention[row, :length] = 1
        # The body without the output head: logits are of no use here.
        output = model.base_model(
            input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False, output_hidden_states=True
        )
        for row, index in enumerate(chosen):
            place = len(sequences[index]) - 1
            found[index] = torch.stack([states[row, place].double().cpu() for states in output.hidden_states])
    return torch.stack(found, dim=1)


def similarities(a: Tensor, b: Tensor) -> list[Similarity]:
    """One entry a layer for states ``[layers + 1, B, D]`` of the same sequences."""
    return [
        Similarity(
            layer,
            float(torch.cosine_similarity(x, y, dim=1).mean()),
            float(((x - y).norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)).mean()),
            linear_cka(x, y),
        )
        for layer, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019) of ``x`` and ``y`` ``[B, D]``; NaN if one is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    # Through the B x B Gram matrices: there are fewer sequences than dimensions.
    first, second = x @ x.T, y @ y.T
    return float((first * second).sum() / (first.norm() * second.norm()))
