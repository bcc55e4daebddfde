"""Batches of token rows, right-padded; what all rows of a batch begin with is passed through the model once.

Chat templates begin every text alike (SmolLM2's with 24 tokens of the 72 that a calibration answer has on average),
and all of a statement's question comes before its single word. The rows attend to the keys and values of that
beginning, as in generation; rounding apart, logits and gradients are those of whole rows.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SHORTEST = 8
"""Beginnings of fewer tokens are not worth a pass of their own."""
_BY_POSITION = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Packed:
    """``prefix``: int64 ``[P]``, what all rows begin with; ``ids`` int64 ``[B, T]``, what follows.

    Padding comes after what reads it: causal attention hides it without a mask. (With one, a padded position whose
    whole window is padding would read nothing and become NaN.)
    """

    prefix: Tensor
    ids: Tensor

    @property
    def skipped(self) -> int:
        """P: by how much a token's position exceeds its column in ``ids``."""
        return len(self.prefix)


def pack(model: Any, rows: Sequence[tuple[int, ...]], pad: int, first: int) -> Packed:
    """The rows on the model's device; position ``first`` and all after it stay in ``ids``."""
    rows = [row or (pad,) for row in rows]
    shared = common(rows, min(first, *(len(row) - 1 for row in rows))) if shares_beginnings(model) else 0
    if shared < SHORTEST or len(rows) < 2:
        shared = 0
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    device = model.get_input_embeddings().weight.device
    return Packed(ids[0, :shared].to(device), ids[:, shared:].to(device))


def common(rows: Sequence[tuple[int, ...]], most: int) -> int:
    """With how many tokens all rows begin alike, ``most`` at most."""
    for place in range(most):
        if any(row[place] != rows[0][place] for row in rows):
            return place
    return max(most, 0)


def shares_beginnings(model: Any) -> bool:
    """Can rows go on from a common beginning? It takes a cache of keys and values by position.

    Not with one persona for each row, and not where weights are divided over processes, which all have to take equally
    many passes.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters or getattr(model, "_is_stateful", False):
        return False
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return (
        kinds <= _BY_POSITION
        and not isinstance(getattr(model, "active", None), list)
        and not isinstance(model.get_input_embeddings().weight, DTensor)
    )


def logits_from(
    model: Any, packed: Packed, first: int, begin: Callable[[Packed], None] = lambda packed: None
) -> Tensor:
    """Logits ``[B, P + T - first, V]`` of positions from ``first`` on: the output head is the costliest layer.

    Gradients go through the beginning too; ``begin`` is called when it has passed, before the rows follow.
    """
    options: dict[str, Any] = {"use_cache": False}
    if packed.skipped:
        options["past_key_values"] = _beginning(model, packed)
    begin(packed)
    # At least one, where nothing follows that could be predicted.
    count = max(packed.skipped + packed.ids.shape[1] - first, 1)
    return model(input_ids=packed.ids, **last_logits(model, count, packed.ids.shape[1]), **options).logits[:, -count:]


def last_logits(model: Any, count: int, width: int) -> dict[str, Tensor]:
    """What tells ``model`` that the logits of the last ``count`` of ``width`` positions are enough; nothing, if it does
    not know.

    Positions and no number: models slice by a number, and the product of a slice with the head is torch's slower one.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {
        "logits_to_keep": torch.arange(max(width - count, 0), width, device=model.get_input_embeddings().weight.device)
    }


def _beginning(model: Any, packed: Packed) -> Any:
    """The cache of the beginning, as every row's own; nothing is copied."""
    ids = packed.prefix.unsqueeze(0)
    cache = model(input_ids=ids, use_cache=True, **last_logits(model, 1, packed.skipped)).past_key_values
    for layer in cache.layers:
        # Layers that attend to an earlier one's keys and values (Gemma 3n) have none of their own.
        if layer.keys is None:
            continue
        layer.keys = layer.keys.expand(len(packed.ids), *layer.keys.shape[1:])
        layer.values = layer.values.expand(len(packed.ids), *layer.values.shape[1:])
    return cache
