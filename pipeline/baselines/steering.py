"""A steering vector: contrastive activation addition (Rimsky et al., arXiv 2312.06681).

The mean difference between the residual stream over one pole's answers and over the other's, added to the output of
some decoder blocks at every position. Theirs is read at the letter of a choice, ours over all tokens of the answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.prompts import Encoded, batches_by_tokens
from pipeline.errors import UserError
from pipeline.sites import decoder_blocks

DEPTHS = (0.4, 0.47, 0.53, 0.6)
"""Which blocks are steered unless told otherwise, as shares of the model's depth."""
HIGHEST = 4.0
"""Largest strength tried: far above 1 a vector breaks the model before it moves the margin further."""
TOLERANCE = 0.05
"""A shift this near to the one that is wanted, relative to it, is equal."""
HALVINGS = 6


@dataclass(frozen=True)
class Strength:
    """A factor on the vectors, what it was measured to do (``shift``, nats), and what a mask does (``target``).

    ``matched`` says whether the two are equal within ``TOLERANCE``.
    """

    value: float
    shift: float
    target: float
    matched: bool


@dataclass(frozen=True)
class Steering:
    """What is added: ``vectors[block]`` float32 ``[D]``, times the strength."""

    vectors: Mapping[int, Tensor]
    strength: Strength


def parse_layers(text: str, count: int) -> list[int]:
    """``"12,14"`` as block numbers from 0; empty is four in the middle. Raises UserError outside ``[0, count)``."""
    if not text.strip():
        return sorted({round(depth * (count - 1)) for depth in DEPTHS})
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--steering-layers {text!r}: expected block numbers such as 12,14") from None
    if not 0 <= layers[0] <= layers[-1] < count:
        raise UserError(f"--steering-layers {text!r}: the model has blocks 0 to {count - 1}")
    return layers


def contrast(
    model: Any, plus: Sequence[Encoded], minus: Sequence[Encoded], layers: Sequence[int], *, batch_tokens: int, pad: int
) -> dict[int, Tensor]:
    """By block, mean of its output over the answers of + minus that over the answers of -, float32 ``[D]``.

    The mean is over an answer's tokens first, then over answers, so that long answers weigh no more.
    """
    sizes = {"batch_tokens": batch_tokens, "pad": pad}
    if any(s.answer >= len(s) for s in (*plus, *minus)):
        raise UserError("a calibration answer has no token left to read a steering vector from; raise --max-length")
    first, second = (_answer_means(model, side, layers, **sizes) for side in (plus, minus))
    return {layer: (first[layer] - second[layer]).float() for layer in layers}


@torch.inference_mode()
def _answer_means(
    model: Any, sequences: Sequence[Encoded], layers: Sequence[int], *, batch_tokens: int, pad: int
) -> dict[int, Tensor]:
    device = model.get_input_embeddings().weight.device
    blocks = list(decoder_blocks(model).values())
    seen: dict[int, Tensor] = {}
    sums: dict[int, Any] = {}
    handles = [
        blocks[layer].register_forward_hook(lambda m, i, output, layer=layer: seen.__setitem__(layer, _hidden(output)))
        for layer in layers
    ]
    try:
        for chosen in batches_by_tokens([len(s) for s in sequences], batch_tokens):
            batch = [sequences[i] for i in chosen]
            ids = torch.full((len(batch), max(map(len, batch))), pad, dtype=torch.int64)
            attention = torch.zeros_like(ids)
            for row, sequence in enumerate(batch):
                ids[row, : len(sequence)] = torch.tensor(sequence.ids)
                attention[row, : len(sequence)] = 1
            model.base_model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
            for layer in layers:
                means = [seen[layer][row, s.answer : len(s)].double().mean(0) for row, s in enumerate(batch)]
                sums[layer] = sums.get(layer, 0) + torch.stack(means).sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / len(sequences) for layer, total in sums.items()}


@contextmanager
def steered(model: Any, vectors: Mapping[int, Tensor], strength: float) -> Iterator[None]:
    """Add ``strength * vectors[block]`` to the output of those blocks at every position, for the time of a block."""
    blocks = list(decoder_blocks(model).values()) if vectors else []

    def adder(vector: Tensor) -> Callable[..., Any]:
        def add(module: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = _hidden(output)
            moved = hidden + (strength * vector).to(hidden)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return add

    handles = [blocks[layer].register_forward_hook(adder(vector)) for layer, vector in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def match(shift: Callable[[float], float], target: float) -> Strength:
    """The strength in ``[0, HIGHEST]`` whose ``shift`` (nats) is ``target``, by doubling from 1 and then bisection.

    Where none is found, the strength that came nearest; 0 where the target is not positive.
    """
    if target <= 0:
        return Strength(0.0, 0.0, target, False)
    tried: dict[float, float] = {0.0: 0.0}

    def near(strength: float) -> bool:
        tried[strength] = shift(strength)
        return equal(tried[strength], target)

    low, high = 0.0, 1.0
    found = near(high)
    while not found and tried[high] < target and high < HIGHEST:
        low, high = high, min(2 * high, HIGHEST)
        found = near(high)
    for _ in range(HALVINGS if not found and tried[high] > target else 0):
        middle = (low + high) / 2
        if near(middle):
            break
        low, high = (middle, high) if tried[middle] < target else (low, middle)
    best = min(tried, key=lambda strength: abs(tried[strength] - target))
    return Strength(best, tried[best], target, equal(tried[best], target))


def equal(shift: float, target: float) -> bool:
    """Whether a shift is the one that is wanted, within ``TOLERANCE``."""
    return abs(shift - target) <= TOLERANCE * abs(target)


def _hidden(output: Any) -> Tensor:
    """The residual stream ``[B, T, D]``: some blocks return it alone, some in a tuple."""
    return output[0] if isinstance(output, tuple) else output
