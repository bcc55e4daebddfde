"""A mask that leaves the margins of a run's other pairs as they are, all its removed weights together (``--apart``).

The direction that a pole's weights are chosen by is apart from other pairs' margins already (``pipeline.weighing``).
Its mask need not be: what is removed also depends on the weights' sizes, the pool and the evidence. So each other
margin gets a price in the gain, as what two answers lean to does, and the prices are found at which the mask's
first-order changes of these margins vanish.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.gradient_files import Gradients
from pipeline.masks import PersonaMasks
from pipeline.sites import find_layers, matrix
from pipeline.stacking import Base

STEP, ROUNDS, CLOSE = 0.05, 4, 0.02
"""The prices that are tried first, nats of the own margin for a nat of an other's; how often they are then corrected,
at most; and what part of the own margin's change the others' may be at the end."""


def margin_changes(
    masks: PersonaMasks, personas: Sequence[str], model: Any, gradients: Gradients, base: Base | None
) -> Tensor:
    """By how much removing what one persona's ``masks`` remove changes the margins of ``personas``, to first order:
    float64 ``[q]``, nats per token. ``base`` has pruned ``model``; what a mask gives back counts the other way."""
    (persona,) = masks.personas
    layers, total = find_layers(model), torch.zeros(len(personas), dtype=torch.float64)
    for name in masks.shapes:
        weight = matrix(layers[name]).detach()
        kept = masks.mask(persona, name).to(weight.device)
        absent = base.absent(name).to(weight) if base and name in base.masks.shapes else 0.0
        change = torch.where(kept, absent, -weight)
        if change.any():
            for place, one in enumerate(personas):
                total[place] += (change * gradients.margin(one, name).to(change)).sum(dtype=torch.float64).cpu()
    return total


def vanishing(changes: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` prices at which ``changes`` of the other margins vanish, or of what was tried are the smallest part
    of the own margin's, and the changes there.

    ``changes(prices)`` are those of the own margin and of the others, ``[1 + count]``. Newton's steps, with slopes from
    one price raised at a time and then corrected by what each step showed (Broyden). Both float64.
    """
    prices = torch.zeros(count, dtype=torch.float64)
    found = changes(prices)
    best = prices, found
    if _share(found) <= CLOSE:
        return best
    slopes = torch.zeros(count, count, dtype=torch.float64)
    for place in range(count):
        # Against the change, so that the trial is a step in the right direction too.
        step = torch.zeros(count, dtype=torch.float64)
        step[place] = -STEP if found[1 + place] > 0 else STEP
        slopes[:, place] = (changes(step) - found)[1:] / step[place]
    for _ in range(ROUNDS):
        if _share(best[1]) <= CLOSE:
            break
        step = -torch.linalg.pinv(slopes, rtol=1e-3) @ found[1:]
        if not step.any():
            break
        before, prices = found, prices + step
        found = changes(prices)
        slopes += torch.outer((found - before)[1:] - slopes @ step, step) / step.square().sum()
        if _share(found) < _share(best[1]):
            best = prices, found
    return best


def _share(changes: Tensor) -> float:
    """What part of the own margin's change the largest other one is; prices that leave the own none are no help."""
    return float(changes[1:].abs().max() / changes[0]) if changes[0] > 0 else math.inf
