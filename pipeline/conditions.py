"""What ``--conditions`` names: the states of the model that a pair of personas is measured in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from pipeline.baselines.retrieval import Examples
from pipeline.baselines.steering import (
    HIGHEST,
    Steering,
    Strength,
    contrast,
    decoder_blocks,
    match,
    parse_layers,
    steered,
)
from pipeline.calibrated import calibration_items
from pipeline.cli import note
from pipeline.config import EvaluateConfig
from pipeline.controls import add_random
from pipeline.data.catalogue import PersonaSet, persona_prompt
from pipeline.data.forms import NEUTRAL, Item
from pipeline.data.module import draw
from pipeline.errors import UserError
from pipeline.neutral import NeutralMasks
from pipeline.protocol import Earlier, Limits, forms_of, margins


@dataclass(frozen=True)
class Setting:
    """A state of the model (mask, vector) and what stands before a question; without all of them the base model.

    ``persona`` is the pole that it speaks for, "" for both. ``opposite`` names the condition that such a setting is
    held against.
    """

    condition: str
    persona: str
    mask: str | None = None
    system: str | None = None
    earlier: Earlier | None = None
    steering: Steering | None = None
    opposite: str = ""


UNMASKED = Setting("unmasked", "")
NOTHING_ADDED = Steering({}, Strength(0.0, 0.0, 0.0, True))
MATCHING_ITEMS = 24
"""Calibration items on which a vector's strength is matched with a mask."""


@dataclass(frozen=True)
class Ground:
    """What settings are made from: the model with its masks, and how to feed it."""

    model: Any
    prompter: Any
    limits: Limits
    config: EvaluateConfig

    @cached_property
    def neutral(self) -> NeutralMasks:
        """Kept, because all pairs share one gradient of neutral text."""
        return NeutralMasks(self.model, self.config.run, self.prompter, self.limits.batch_tokens)


@contextmanager
def applied(ground: Ground, setting: Setting) -> Iterator[None]:
    """The model as the setting says, for the time of a block; words are up to who asks."""
    added = setting.steering or NOTHING_ADDED
    with (
        ground.model.using(setting.mask, ground.config.gamma if setting.mask else 0.0),
        steered(ground.model.model, added.vectors, added.strength.value),
    ):
        yield


def prompt_ids(ground: Ground, setting: Setting, question: str) -> list[int]:
    """The tokens that the model reads before it answers a question under a setting."""
    turns = setting.earlier(question) if setting.earlier else ()
    return ground.prompter.ids(ground.prompter.prompt(question, setting.system, turns))


def settings(name: str, ground: Ground, pair: PersonaSet) -> list[Setting]:
    """The settings of one name of ``--conditions`` for a pair. Raises UserError if it cannot be had."""
    return _MAKERS[name](ground, pair)


def poles(pair: PersonaSet) -> tuple[tuple[str, str], tuple[str, str]]:
    """Each pole with its opponent."""
    assert pair.minus is not None
    return (pair.plus, pair.minus), (pair.minus, pair.plus)


def _prompt(ground: Ground, pair: PersonaSet) -> list[Setting]:
    return [Setting("prompt", pole, system=persona_prompt(pole, pair.source)) for pole, _ in poles(pair)]


def _in_context(ground: Ground, pair: PersonaSet) -> list[Setting]:
    manifest, shots = ground.model.masks.manifest, ground.config.shots
    return [
        Setting("in context", pole, earlier=Examples(calibration_items(manifest, pole), shots))
        for pole, _ in poles(pair)
    ]


def _steering(ground: Ground, pair: PersonaSet) -> list[Setting]:
    """Both poles' vectors, each so strong that it shifts the calibration items' margin as the pole's mask does."""
    model, limits = ground.model, ground.limits
    items = calibration_items(model.masks.manifest, pair.plus)
    layers = parse_layers(ground.config.steering_layers, len(decoder_blocks(model.model)))
    sides = (items, [item.swapped() for item in items])
    own, other = (limits.cut([ground.prompter.encode(i.question, i.matching) for i in side]) for side in sides)
    vectors = contrast(model.model, own, other, layers, batch_tokens=limits.batch_tokens, pad=limits.pad)
    turned = {layer: -vector for layer, vector in vectors.items()}
    return [
        Setting("steering vector", pole, steering=_matched(ground, pole, side, towards))
        for (pole, _), side, towards in zip(poles(pair), sides, (vectors, turned), strict=True)
    ]


def _matched(ground: Ground, pole: str, items: list[Item], vectors: dict[int, Tensor]) -> Steering:
    """``items`` are seen from the pole's side."""
    few = draw(items, MATCHING_ITEMS, ground.config.seed)
    (form,) = forms_of(few, options=False)

    def margin(setting: Setting) -> float:
        with applied(ground, setting):
            model, prompter = ground.model.model, ground.prompter
            summed = margins(model, prompter, few, form, system=None, limits=ground.limits).summed
        return sum(summed) / len(summed)

    def shift(strength: float) -> float:
        steering = Steering(vectors, Strength(strength, 0.0, 0.0, False))
        return margin(Setting("steering vector", pole, steering=steering)) - base

    base = margin(UNMASKED)
    found = match(shift, margin(Setting("own mask", pole, mask=pole)) - base)
    if not found.matched:
        note(
            f"steering vector of {pole}: the mask shifts the calibration margin by {found.target:+.2f} nats, no "
            f"strength up to {HIGHEST} does; measured at {found.value:.3g}, which shifts it by {found.shift:+.2f}"
        )
    return Steering(vectors, found)


def _mask(ground: Ground, pair: PersonaSet) -> list[Setting]:
    return [Setting("own mask", pole, mask=pole) for pole, _ in poles(pair)]


def _prompt_and_mask(ground: Ground, pair: PersonaSet) -> list[Setting]:
    return [
        Setting("prompt and mask", pole, mask=pole, system=persona_prompt(pole, pair.source)) for pole, _ in poles(pair)
    ]


def _neutral(ground: Ground, pair: PersonaSet) -> list[Setting]:
    """One mask for both poles; none, and said why, where the run's recipe has none."""
    try:
        return [Setting("neutral mask", "", mask=ground.neutral.add(pair))]
    except UserError as error:
        note(f"no neutral mask: {error}")
        return []


def _others(ground: Ground, pair: PersonaSet) -> list[Setting]:
    """The masks of the run's other personas; of two opposing ones, the first is held against the second."""
    manifest = ground.model.masks.manifest
    names = [name for name in manifest["masks"] if name not in pair.poles and name != NEUTRAL]
    if not names:
        note(f"no other masks for {pair.plus}/{pair.minus}: the run has one pair; calibrate several together")
    opponents = manifest["personas"]["opponents"]
    return [
        Setting(
            f"other mask: {name}",
            "",
            mask=name,
            opposite=f"other mask: {opponents[name]}" if opponents.get(name) in names[number + 1 :] else "",
        )
        for number, name in enumerate(names)
    ]


def _random(ground: Ground, pair: PersonaSet) -> list[Setting]:
    config = ground.config
    draws = add_random(ground.model, config.run, pair, config.draws, config.seed)
    return [
        Setting("random mask" if number == 1 else f"random mask {number}", pole, mask=names[pole])
        for number, names in enumerate(draws, 1)
        for pole in names
    ]


_MAKERS: dict[str, Callable[[Ground, PersonaSet], list[Setting]]] = {
    "prompt": _prompt,
    "rag": _in_context,
    "steering": _steering,
    "mask": _mask,
    "prompt+mask": _prompt_and_mask,
    "neutral": _neutral,
    "random": _random,
    "others": _others,
}
