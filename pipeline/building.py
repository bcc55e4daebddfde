"""Score every layer for every persona and select its weights."""

from collections.abc import Collection
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from kernels.ops.pack_bits import unpack_bits
from pipeline.config import CalibrateConfig, Sparsity
from pipeline.criteria import CRITERIA, Layer, Slopes
from pipeline.data.catalogue import Catalogue
from pipeline.errors import UserError
from pipeline.gradients import Gradients
from pipeline.masks import PersonaMasks
from pipeline.pooling import Pooled, compared
from pipeline.sites import maskable, matrix
from pipeline.stacking import stacked
from pipeline.stats import ActivationStats, ChannelStats


def build_masks(
    model: Any,
    stats: ActivationStats,
    catalogue: Catalogue,
    config: CalibrateConfig,
    gradients: Gradients | None = None,
    *,
    only: str | None = None,
    layers: Collection[str] = (),
    factor: Decimal = Decimal(1),
    base: PersonaMasks | None = None,
) -> PersonaMasks:
    """Masks of all personas of the catalogue, or of ``only`` one; the first-order criteria need ``gradients``.

    Of all layers, or of some. ``factor`` scales ``--sparsity``; ``base`` has pruned ``model``, and stays removed.
    """
    stats = composed(stats, catalogue)
    criterion, sparsity = CRITERIA[config.criterion], Sparsity.parse(config.sparsity).scaled(factor)
    personas = [only] if only else catalogue.personas
    where = {linear: site.name for site in stats.sites for linear in site.linears}
    widths = {site.name: site.width for site in stats.sites}
    shapes: dict[str, tuple[int, int]] = {}
    bits: dict[str, dict[str, Tensor]] = {persona: {} for persona in personas}
    pooled = Pooled(stats, config.expert_tokens)
    for name, module in maskable(model, config).items():
        if name not in where or (layers and name not in layers):
            continue
        weight = matrix(module)
        if widths[where[name]] != weight.shape[1]:
            raise UserError(f"layer {name} has {weight.shape[1]} inputs, the statistics have {widths[where[name]]}")
        shapes[name] = (weight.shape[0], weight.shape[1])
        channels: dict[tuple[str, bool], ChannelStats] = {}
        for persona in personas:
            measured, opponent = compared(persona, catalogue, config)
            few = pooled.needed(where[name], (measured, opponent))
            for one in filter(None, (measured, opponent)):
                if (one, few) not in channels:
                    channels[one, few] = pooled.of(one, name) if few else stats.channels(one, where[name])
            taken = bits[opponent].get(name) if config.disjoint and opponent in bits else None
            layer = Layer(
                name,
                weight,
                persona,
                channels[measured, few],
                channels[opponent, few] if opponent else None,
                sparsity.keep(name, weight.shape[1]),
                config.activation,
                config.temperature,
                config.seed,
                None if taken is None else unpack_bits(taken, weight.shape[1]),
                _slopes(gradients, persona, name, weight.device) if gradients else None,
                config.pool,
                config.evidence,
                config.shift,
            )
            bits[persona][name] = criterion(layer)
    return stacked(PersonaMasks(shapes, bits), _part(base, layers))


def _part(base: PersonaMasks | None, layers: Collection[str]) -> PersonaMasks | None:
    """``base`` over some layers, or all."""
    if base is None or not layers:
        return base
    return PersonaMasks({name: shape for name, shape in base.shapes.items() if name in layers}, base.bits)


def shapes_of(
    model: Any, stats: ActivationStats, config: CalibrateConfig, base: PersonaMasks | None = None
) -> dict[str, tuple[int, int]]:
    """Every layer that gets masks, with its ``[N, K]``; those that ``base`` masks have them already."""
    measured = {linear for site in stats.sites for linear in site.linears}
    found = {
        name: (matrix(module).shape[0], matrix(module).shape[1])
        for name, module in maskable(model, config).items()
        if name in measured
    }
    if not found:
        raise UserError("the statistics are of another model: no layer of this one is in them")
    return {**base.shapes, **found} if base else found


def _slopes(gradients: Gradients, persona: str, name: str, device: torch.device) -> Slopes:
    found = (*gradients.of(persona, name), gradients.neutral(name), gradients.variance(persona, name))
    return Slopes(*(tensor.to(device) for tensor in found))


def composed(stats: ActivationStats, catalogue: Catalogue) -> ActivationStats:
    """The measured personas and the compositions (types, mixtures) side by side; as they are if they are already."""
    if all(c.name in stats.personas for c in catalogue.compositions):
        return stats
    return stats.concatenate(stats.compose({c.name: c.parts for c in catalogue.compositions}))


def overlaps_of(masks: PersonaMasks, catalogue: Catalogue) -> dict[str, float]:
    """For ``--disjoint``: the share of a second pole's kept weights that overlap with the first's."""
    overlaps = {}
    for index, persona in enumerate(masks.personas):
        opponent = catalogue.opponents.get(persona)
        if opponent in masks.personas[:index]:
            shared = masks.intersection("shared", (persona, opponent)).density("shared")
            overlaps[f"{opponent} and {persona}"] = shared / masks.density(persona)
    return overlaps
