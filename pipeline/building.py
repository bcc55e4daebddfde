"""Score every layer for every persona and select its weights."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from kernels.ops.pack_bits import pack_bits, unpack_bits
from pipeline.config import WHITENED, CalibrateConfig, Sparsity
from pipeline.criteria import CRITERIA, Choice, Layer, Slopes, choice
from pipeline.data.catalogue import Catalogue
from pipeline.errors import UserError
from pipeline.gradient_files import Gradients
from pipeline.masks import PersonaMasks, count_kept, density
from pipeline.pooling import Pooled, compared
from pipeline.sites import maskable, matrix
from pipeline.stacking import Base
from pipeline.stats import ActivationStats, ChannelStats

KNOWN_BYTES = 2 << 30
"""So much of what the masks of a search choose among stays in memory from one to the next."""


@dataclass(frozen=True)
class LayerMask:
    """One persona's mask of one layer of ``shape`` ``(N, K)``: ``bits`` uint8 ``[N, ceil(K / 8)]``.

    ``shared``: with ``--disjoint``, how many of the weights that it keeps its opponent, who was first, keeps too.
    """

    layer: str
    shape: tuple[int, int]
    persona: str
    bits: Tensor
    shared: int | None = None


def build_masks(
    model: Any,
    stats: ActivationStats,
    catalogue: Catalogue,
    config: CalibrateConfig,
    gradients: Gradients | None = None,
    **some: Any,
) -> PersonaMasks:
    """All masks of ``each_mask`` (with ``some`` of its further options) in memory."""
    shapes: dict[str, tuple[int, int]] = {}
    bits: dict[str, dict[str, Tensor]] = {}
    for one in each_mask(model, stats, catalogue, config, gradients, **some):
        shapes[one.layer] = one.shape
        bits.setdefault(one.persona, {})[one.layer] = one.bits
    return PersonaMasks(shapes, bits)


def each_mask(
    model: Any,
    stats: ActivationStats,
    catalogue: Catalogue,
    config: CalibrateConfig,
    gradients: Gradients | None = None,
    *,
    only: str | None = None,
    layers: Collection[str] = (),
    factor: Decimal = Decimal(1),
    base: Base | None = None,
    price: float = 0.0,
    both_price: float = 0.0,
    apart: Mapping[str, float] | None = None,
    known: dict[str, Choice] | None = None,
) -> Iterator[LayerMask]:
    """Masks of all personas of the catalogue, or of ``only`` one; the first-order criteria need ``gradients``.

    Of all layers in turn, or of some; of a layer, of one persona after another. ``factor`` scales ``--sparsity``;
    ``base`` has pruned ``model``; what it removes stays removed, but for what ``first-order`` gives back. Nothing that
    was handed over is kept here, but for ``--disjoint`` the masks of the layer at work. ``price`` and
    ``both_price``: what leaning to the first of two answers is worth, and both of them (``pipeline.leaning``);
    ``apart``: what other pairs' margins are (``pipeline.apart``). ``known``: by layer, what ``first-order`` chooses
    among for this one persona at these margins; what is missing is put there, up to ``KNOWN_BYTES``.
    """
    stats = composed(stats, catalogue)
    criterion, sparsity = CRITERIA[config.criterion], Sparsity.parse(config.sparsity).scaled(factor)
    personas = [only] if only else catalogue.personas
    where = {linear: site.name for site in stats.sites for linear in site.linears}
    widths = {site.name: site.width for site in stats.sites}
    pooled = Pooled(stats, config.expert_tokens)
    chosen = maskable(model, config)
    yield from _untouched(base, personas, layers, where.keys() & chosen.keys())
    for name, module in chosen.items():
        if name not in where or (layers and name not in layers):
            continue
        weight = matrix(module)
        if widths[where[name]] != weight.shape[1]:
            raise UserError(f"layer {name} has {weight.shape[1]} inputs, the statistics have {widths[where[name]]}")
        keep = sparsity.keep(name, weight.shape[1])
        if known and name in known:
            bits = known[name].bits(weight.shape[1] - keep, price, both_price)
            yield LayerMask(name, (weight.shape[0], weight.shape[1]), personas[0], bits)
            continue
        absent = below = None
        if base and name in base.masks.shapes:
            absent, below = base.absent(name).to(weight), base.kept(name).to(weight.device)
        before: dict[str, Tensor] = {}
        channels: dict[tuple[str, bool], ChannelStats] = {}
        for persona in personas:
            measured, opponent = compared(persona, catalogue, config)
            few = pooled.needed(where[name], (measured, opponent))
            for one in filter(None, (measured, opponent)):
                if (one, few) not in channels:
                    channels[one, few] = pooled.of(one, name) if few else stats.channels(one, where[name])
            taken = before.get(opponent) if opponent else None
            room = known is not None and sum(one.nbytes for one in known.values()) < KNOWN_BYTES
            leans = room and gradients is not None and gradients.leans(persona)
            slopes = None
            if gradients:
                also = leans or price != 0, leans or both_price != 0
                slopes = _slopes(gradients, persona, name, weight.device, also, apart)
            layer = Layer(
                name,
                weight,
                persona,
                channels[measured, few],
                channels[opponent, few] if opponent else None,
                keep,
                config.activation,
                config.temperature,
                config.seed,
                None if taken is None else unpack_bits(taken, weight.shape[1]),
                slopes,
                config.pool,
                config.evidence,
                config.shift,
                absent,
                below,
                price,
                both_price,
            )
            if known is not None and room:
                known[name] = found = choice(layer)
                bits = found.bits(weight.shape[1] - keep, price, both_price)
            else:
                bits = criterion(layer)
            if below is not None and config.criterion != WHITENED:
                bits = bits & pack_bits(below)
            if config.disjoint:
                before[persona] = bits
            shared = None if taken is None else count_kept(bits & taken)
            yield LayerMask(name, (weight.shape[0], weight.shape[1]), persona, bits, shared)


def _untouched(
    base: Base | None, personas: Iterable[str], layers: Collection[str], chosen: Collection[str]
) -> Iterator[LayerMask]:
    """The layers, or of some, that ``base`` masks and nothing is ``chosen`` from: all personas' masks are its own."""
    if base is None:
        return
    for name, shape in base.masks.shapes.items():
        if name not in chosen and (not layers or name in layers):
            for persona in personas:
                yield LayerMask(name, shape, persona, base.masks.bits[base.persona][name])


def shapes_of(
    model: Any, stats: ActivationStats, config: CalibrateConfig, base: Base | None = None
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
    return {**base.masks.shapes, **found} if base else found


def _slopes(
    gradients: Gradients,
    persona: str,
    name: str,
    device: torch.device,
    also: tuple[bool, bool],
    apart: Mapping[str, float] | None,
) -> Slopes:
    """``also``: is what the persona leans to asked for, and both answers?"""
    margin, error = gradients.of(persona, name, apart)
    known = margin, error, gradients.neutral(name), gradients.variance(persona, name)
    margin, error, neutral, variance = (tensor.to(device) for tensor in known)
    leaning = gradients.leaning(persona, name).to(device) if also[0] else None
    both = gradients.both(persona, name).to(device) if also[1] else None
    return Slopes(margin, error, neutral, variance, leaning, both)


def composed(stats: ActivationStats, catalogue: Catalogue) -> ActivationStats:
    """The measured personas and the compositions (types, mixtures) side by side; as they are if they are already."""
    if all(c.name in stats.personas for c in catalogue.compositions):
        return stats
    return stats.concatenate(stats.compose({c.name: c.parts for c in catalogue.compositions}))


def second_poles(catalogue: Catalogue) -> dict[str, str]:
    """The personas whose opponent gets its masks before them, with that opponent."""
    opponents = {persona: catalogue.opponents.get(persona, "") for persona in catalogue.personas}
    order = {persona: number for number, persona in enumerate(catalogue.personas)}
    return {persona: other for persona, other in opponents.items() if order.get(other, len(order)) < order[persona]}


def overlaps(
    shared: dict[str, int],
    kept: Mapping[str, Iterable[int]],
    shapes: dict[str, tuple[int, int]],
    catalogue: Catalogue,
) -> dict[str, float]:
    """For ``--disjoint``: by pair, the share of a second pole's kept weights that the first keeps too.

    ``shared``: by second pole, the number of such weights; ``kept``: by persona, that of all, layer by layer.
    """
    return {
        f"{opponent} and {persona}": density([shared[persona]], shapes) / density(kept[persona], shapes)
        for persona, opponent in second_poles(catalogue).items()
    }
