"""How strong a steering vector is made: as strong as the mask that it is compared with, by one measure or another."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.baselines.steering import HIGHEST, Steering, Strength, equal, match
from pipeline.budget import NEUTRAL_TEXTS
from pipeline.cli import note
from pipeline.data.catalogue import neutral_set
from pipeline.data.forms import Item
from pipeline.data.module import draw
from pipeline.likelihood import perplexity
from pipeline.protocol import forms_of, margins
from pipeline.setting import UNMASKED, Ground, Setting, applied

MATCHING_ITEMS = 24
"""Calibration items on which a vector's shift is matched with a mask's."""
NEUTRAL_ANSWERS = 32
"""Neutral pairs on whose answers a vector's cost is matched with a mask's."""
LEAST_COST = 0.01
"""Nats per token: a mask that costs less, or nothing, is matched as if it cost so much."""


def matched(ground: Ground, pole: str, items: list[Item], vectors: Mapping[int, Tensor]) -> Steering:
    """The vectors of a pole with their strength, as ``--steering-strength`` says; ``items`` are seen from its side."""
    wanted = ground.config.steering_strength
    measure = _cost(ground) if wanted == "cost" else _margin(ground, items)
    base = measure(UNMASKED)
    target = measure(Setting("own mask", pole, mask=pole)) - base

    def shift(strength: float) -> float:
        steering = Steering(vectors, Strength(strength, 0.0, 0.0, False))
        return measure(Setting("steering vector", pole, steering=steering)) - base

    if wanted not in ("shift", "cost"):
        given = shift(float(wanted))
        return Steering(vectors, Strength(float(wanted), given, target, equal(given, target)))
    found = match(shift, max(target, LEAST_COST) if wanted == "cost" else target)
    if not found.matched:
        what = "perplexity (log)" if wanted == "cost" else "calibration margin"
        note(
            f"steering vector of {pole}: the mask shifts the {what} by {found.target:+.3g} nats, no strength up to "
            f"{HIGHEST:g} was found that does; measured at {found.value:.3g}, which shifts it by {found.shift:+.3g}"
        )
    return Steering(vectors, found)


def _margin(ground: Ground, items: list[Item]) -> Callable[[Setting], float]:
    """Mean summed margin of some of the items, nats."""
    few = draw(items, MATCHING_ITEMS, ground.config.seed)
    (form,) = forms_of(few, options=False)

    def measure(setting: Setting) -> float:
        with applied(ground, setting):
            model, prompter = ground.model.model, ground.prompter
            summed = margins(model, prompter, few, form, system=None, limits=ground.limits).summed
        return sum(summed) / len(summed)

    return measure


def _cost(ground: Ground) -> Callable[[Setting], float]:
    """Negative log-probability per token of neutral answers, nats."""
    limits = ground.limits
    texts = limits.cut([ground.prompter.encode(i.question, i.matching) for i in neutral_items(ground)])

    def measure(setting: Setting) -> float:
        with applied(ground, setting):
            return math.log(perplexity(ground.model, texts, batch_tokens=limits.batch_tokens, pad=limits.pad))

    return measure


def neutral_items(ground: Ground) -> list[Item]:
    """Neutral pairs that no gradient of the run has seen: a mask may be fitted to those that one has."""
    options = ground.model.masks.manifest["options"]
    seen = draw(neutral_set().items, min(options["samples"] or NEUTRAL_TEXTS, NEUTRAL_TEXTS), options["seed"])
    return draw([item for item in neutral_set().items if item not in seen], NEUTRAL_ANSWERS, ground.config.seed)
