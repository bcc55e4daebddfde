"""What ``--conditions`` names: the states of the model that a pair of personas is measured in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.baselines.retrieval import examples
from pipeline.calibrated import calibration_items
from pipeline.config import EvaluateConfig
from pipeline.controls import add_random
from pipeline.data.catalogue import PersonaSet, persona_prompt
from pipeline.protocol import Earlier, Limits


@dataclass(frozen=True)
class Setting:
    """A state of the model and what stands before a question; without mask, system prompt and turns the base model.

    ``persona`` is the pole that it speaks for, "" for both.
    """

    condition: str
    persona: str
    mask: str | None = None
    system: str | None = None
    earlier: Earlier | None = None


UNMASKED = Setting("unmasked", "")


@dataclass(frozen=True)
class Ground:
    """What settings are made from: the model with its masks, and how to feed it."""

    model: Any
    prompter: Any
    limits: Limits
    config: EvaluateConfig


@contextmanager
def applied(ground: Ground, setting: Setting) -> Iterator[None]:
    """The model as the setting says, for the time of a block; words are up to who asks."""
    with ground.model.using(setting.mask, ground.config.gamma if setting.mask else 0.0):
        yield


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
        Setting("in context", pole, earlier=examples(calibration_items(manifest, pole), shots))
        for pole, _ in poles(pair)
    ]


def _mask(ground: Ground, pair: PersonaSet) -> list[Setting]:
    return [Setting("own mask", pole, mask=pole) for pole, _ in poles(pair)]


def _prompt_and_mask(ground: Ground, pair: PersonaSet) -> list[Setting]:
    return [
        Setting("prompt and mask", pole, mask=pole, system=persona_prompt(pole, pair.source)) for pole, _ in poles(pair)
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
    "mask": _mask,
    "prompt+mask": _prompt_and_mask,
    "random": _random,
}
