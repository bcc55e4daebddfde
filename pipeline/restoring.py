"""Which blocks carry a persona: its separation with some of the layers left whole (paper: layer restoring, T. 7)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kernels.ops.pack_bits import pack_bits
from pipeline.analysis import depth_of, kind_of
from pipeline.data.catalogue import PersonaSet
from pipeline.evaluation import Contrast, State, contrasts_of
from pipeline.masks import PersonaMasks
from pipeline.protocol import forms_of, margins

WHOLE = "nothing"
"""What is restored in the pair's own masks."""


@dataclass(frozen=True)
class Restored:
    """A pair's contrast with the layers ``part`` unmasked; ``lost`` is the share of the shift that went with them."""

    part: str
    lost: float
    contrast: Contrast


def parts_of(layers: Iterable[str], groups: int) -> dict[str, list[str]]:
    """Layers by what is restored together: ``groups`` runs of blocks of about equal length, then every block's half.

    The halves are the first words of what follows the block's number (``self_attn``, ``mlp``). Layers outside the
    blocks are in none.
    """
    inside = {layer: depth for layer in layers if (depth := depth_of(layer)) is not None}
    depths = sorted(set(inside.values()))
    size = math.ceil(len(depths) / groups) or 1
    parts = {}
    for start in range(0, len(depths), size):
        run = depths[start : start + size]
        name = f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]} to {run[-1]}"
        parts[name] = [layer for layer, depth in inside.items() if depth in run]
    halves: dict[str, list[str]] = {}
    for layer in inside:
        halves.setdefault(f"all {kind_of(layer).split('.')[0]}", []).append(layer)
    return parts | (halves if len(halves) > 1 else {})


def restored(masks: PersonaMasks, persona: str, layers: Iterable[str], name: str) -> PersonaMasks:
    """A mask called ``name`` that keeps everything in ``layers`` and what ``persona`` keeps elsewhere."""
    import torch

    chosen = set(layers)
    bits = {
        layer: pack_bits(torch.ones(shape, dtype=torch.bool)) if layer in chosen else masks.bits[persona][layer]
        for layer, shape in masks.shapes.items()
    }
    return PersonaMasks(masks.shapes, {name: bits}, masks.manifest)


def restoring(ground: Any, pair: PersonaSet, groups: int) -> Iterator[Restored]:
    """The pair's own masks first, then with one part restored after another. Adds masks to the model."""
    whole = math.nan
    nothing: dict[str, list[str]] = {WHOLE: []}
    for part, layers in (nothing | parts_of(ground.model.masks.shapes, groups)).items():
        names = {}
        for pole in pair.poles:
            names[pole] = pole if part == WHOLE else f"restored-{len(ground.model.masks.personas)}-{pole}"
            if part != WHOLE:
                ground.model.add(restored(ground.model.masks, pole, layers, names[pole]))
        contrast = _contrast(ground, pair, names)
        whole = contrast.shift if part == WHOLE else whole
        yield Restored(part, 1 - contrast.shift / whole if whole else math.nan, contrast)


def _contrast(ground: Any, pair: PersonaSet, names: dict[str, str]) -> Contrast:
    """The pair's contrast between two masks, in the first form of its items."""
    form = forms_of(pair.items, False)[0]
    states = []
    for pole, mask in names.items():
        with ground.model.using(mask, ground.config.gamma):
            measured = margins(ground.model.model, ground.prompter, pair.items, form, system=None, limits=ground.limits)
        states.append(State("own mask", pole, None, 0.0, math.nan, {form: measured}))
    options = {"resamples": ground.config.bootstrap, "seed": ground.config.seed}
    (contrast,) = contrasts_of(pair, states[0], states, **options)
    return contrast
