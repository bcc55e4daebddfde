"""What ``--conditions`` names: the states of the model that a pair of personas is measured in."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.ops.pack_bits import pack_bits
from pipeline.baselines.finetuning import fine_tune
from pipeline.baselines.retrieval import Examples
from pipeline.baselines.steering import contrast, decoder_blocks, parse_layers
from pipeline.baselines.strength import matched
from pipeline.calibrated import calibration_items
from pipeline.cli import note
from pipeline.controls import add_random
from pipeline.data.catalogue import PersonaSet, persona_prompt
from pipeline.data.forms import NEUTRAL
from pipeline.errors import UserError
from pipeline.loading import load_model
from pipeline.masks import PersonaMasks
from pipeline.setting import Ground, Setting, poles
from pipeline.stacking import base_files, base_masks


def check(ground: Ground, pairs: Sequence[PersonaSet]) -> None:
    """Raise UserError now for what a condition asked for would raise it for after much work."""
    if {"rag", "steering", "lora"} & set(ground.config.wanted):
        for pair in pairs:
            calibration_items(ground.model.masks.manifest, pair.plus)
    if {"base", "random", "rows"} & set(ground.config.wanted):
        base_files(ground.model.masks.manifest["options"].get("on", ""))
    if "steering" in ground.config.wanted:
        parse_layers(ground.config.steering_layers, len(decoder_blocks(ground.model.model)))


def settings(name: str, ground: Ground, pair: PersonaSet) -> list[Setting]:
    """The settings of one name of ``--conditions`` for a pair. Raises UserError if it cannot be had."""
    return _MAKERS[name](ground, pair)


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
        Setting("steering vector", pole, steering=matched(ground, pole, side, towards))
        for (pole, _), side, towards in zip(poles(pair), sides, (vectors, turned), strict=True)
    ]


def _fine_tuned(ground: Ground, pair: PersonaSet) -> list[Setting]:
    """Each pole's adapter, trained on a copy of the model; experts of one parameter have none."""
    config, model, limits = ground.config, ground.model, ground.limits
    modules = dict(model.model.named_modules())
    layers = [name for name in model.masks.shapes if name in modules]
    made = []
    for pole, _ in poles(pair):
        items = calibration_items(model.masks.manifest, pole)
        answers = limits.cut([ground.prompter.encode(item.question, item.matching) for item in items])
        copy = load_model(config.model or model.masks.manifest["model"]["id"], model.model.dtype, model.model.device)
        note(f"fine-tuning on the {len(answers)} calibration answers of {pole}")
        adapter = fine_tune(
            copy,
            answers,
            layers,
            rank=config.lora_rank,
            epochs=config.lora_epochs,
            rate=config.lora_rate,
            seed=config.seed,
            batch_tokens=max(limits.batch_tokens // 4, 1),
            pad=limits.pad,
        )
        note(f"{pole}: {', '.join(f'{loss:.2f}' for loss in adapter.losses)} nats per token, epoch by epoch")
        made.append(Setting("fine-tuned", pole, adapter=adapter))
    return made


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


def _base(ground: Ground, pair: PersonaSet) -> list[Setting]:
    """The mask that the run's masks stand on, one for both poles; none where they stand on the whole model."""
    base = base_masks(ground.model.masks.manifest["options"].get("on", ""))
    if base is None:
        note("no base mask: the run's masks stand on the whole model (pipeline.calibrate --on)")
        return []
    (persona,) = base.personas
    name = f"base-{len(ground.model.personas)}"
    shapes = ground.model.masks.shapes
    # Layers that it leaves whole are masked by the run alone.
    whole = {layer: pack_bits(torch.ones(shape, dtype=torch.bool)) for layer, shape in shapes.items()}
    ground.model.add(PersonaMasks(shapes, {name: {**whole, **base.bits[persona]}}, base.manifest))
    return [Setting("base mask", "", mask=name)]


def _others(ground: Ground, pair: PersonaSet) -> list[Setting]:
    """The masks of other personas, of the run and of others; of two opposing ones, the first is held against the
    second."""
    manifest = ground.model.masks.manifest
    names = [name for name in (*manifest["masks"], *ground.others) if name not in pair.poles and name != NEUTRAL]
    if not names:
        note(
            f"no other masks for {pair.plus}/{pair.minus}: the run has one pair; calibrate several together, or name "
            f"--other-runs"
        )
    opponents = manifest["personas"]["opponents"] | ground.others
    return [
        Setting(
            f"other mask: {name}",
            "",
            mask=name,
            opposite=f"other mask: {opponents[name]}" if opponents.get(name) in names[number + 1 :] else "",
        )
        for number, name in enumerate(names)
    ]


def _random(ground: Ground, pair: PersonaSet, condition: str = "random mask", rows: bool = False) -> list[Setting]:
    config = ground.config
    draws = add_random(ground.model, config.run, pair, config.draws, config.seed, rows=rows)
    return [
        Setting(condition if number == 1 else f"{condition} {number}", pole, mask=names[pole])
        for number, names in enumerate(draws, 1)
        for pole in names
    ]


_MAKERS: dict[str, Callable[[Ground, PersonaSet], list[Setting]]] = {
    "prompt": _prompt,
    "rag": _in_context,
    "steering": _steering,
    "lora": _fine_tuned,
    "mask": _mask,
    "prompt+mask": _prompt_and_mask,
    "neutral": _neutral,
    "base": _base,
    "random": _random,
    "rows": partial(_random, condition="random in rows", rows=True),
    "others": _others,
}
