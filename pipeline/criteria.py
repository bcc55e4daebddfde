"""From statistics to the packed mask of one layer, one function per criterion.

A criterion takes a ``Layer`` and returns packed bits; the scores themselves are in ``scoring``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from kernels.ops.mask_select import mask_select, mask_select_scores
from kernels.ops.pack_bits import pack_bits, unpack_bits
from pipeline import scoring
from pipeline.errors import UserError
from pipeline.stats import ChannelStats

BLOCK = 128
"""Columns that SparseGPT prunes together (eq. 5)."""
PRICES, HALVINGS = (0.25, 64.0), 6
"""Nats of margin that a nat of neutral text is worth: the first price tried and the last, and how often the interval
between them is then halved."""


@dataclass(frozen=True)
class Slopes:
    """What one layer's gradients say for one persona, float32 ``[N, K]`` each: the gradient of the persona's margin
    with its standard error over items, that of the likelihood of neutral text, and the variance of the gradient of an
    answer's mean log-probability over all answers, up to one factor for all layers (0 throughout: unknown); and, where
    they have a price, that of one of the pair's two answers against the other, and of both (``pipeline.leaning``)."""

    margin: Tensor
    error: Tensor
    neutral: Tensor
    variance: Tensor
    leaning: Tensor | None = None
    both: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """All that a criterion may look at: a layer's weight ``[N, K]`` and one persona's statistics at its input.

    ``keep`` weights stay in each row. ``taken`` (bool ``[N, K]``) are ranked last: the weights that the
    opposite pole has kept already, under ``--disjoint``. A first-order criterion goes by ``slopes``; it chooses
    from the share ``pool`` of each row, what gains at least ``evidence`` standard errors. ``shift`` is target-shift's
    alpha. On a mask, ``below`` (bool ``[N, K]``): ``weight`` is 0 where that removes it, and ``absent`` what it was, 0
    elsewhere. ``price`` and ``both_price``: nats of margin that a nat of leaning is worth, and one of both answers.
    """

    name: str
    weight: Tensor
    persona: str
    own: ChannelStats
    other: ChannelStats | None
    keep: int
    activation: str = "softplus"
    temperature: float = 2.0
    seed: int = 0
    taken: Tensor | None = None
    slopes: Slopes | None = None
    pool: float = 0.3
    evidence: float = 1.0
    shift: float = 1.0
    absent: Tensor | None = None
    below: Tensor | None = None
    price: float = 0.0
    both_price: float = 0.0


def wanda(layer: Layer) -> Tensor:
    return _by_channel(layer, scoring.wanda(layer.own.mean_abs))


def sparse(layer: Layer) -> Tensor:
    """In blocks of 128 columns, each with its share of the row's ``keep`` (rounded so that they add up exactly)."""
    score, columns, blocks = scoring.sparse(layer.own.mean_square), layer.weight.shape[1], []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # Cumulative floors apportion the row exactly whatever the block sizes.
        keep = layer.keep * stop // columns - layer.keep * start // columns
        taken = None if layer.taken is None else layer.taken[:, start:stop]
        blocks.append(_select(layer.weight[:, start:stop], score[start:stop], keep, taken))
    # 128 columns are whole bytes, so packed blocks concatenate.
    return torch.cat(blocks, dim=1)


def contrastive_wanda(layer: Layer) -> Tensor:
    own, other = layer.own, _opponent(layer)
    z = scoring.contrast(own.mu, other.mu, own.variance, other.variance)
    score = scoring.contrastive_wanda(z, layer.activation, layer.temperature)
    # relu leaves zeros by design, softplus where it underflows: both rank on by wanda's score.
    magnitude = layer.weight.float().abs()
    return _by_scores(layer, magnitude * score, magnitude * scoring.wanda(own.mean_abs))


def contrastive_sparse(layer: Layer) -> Tensor:
    own, other = scoring.sparse(layer.own.mean_square), scoring.sparse(_opponent(layer).mean_square)
    owned, rank = scoring.contrastive_sparse(layer.weight, own, other)
    return _by_scores(layer, owned, rank)


def target_shift(layer: Layer) -> Tensor:
    """A steering vector as a mask: every output's mean moves towards the persona's by what is no longer added to it.

    The poles' outputs differ by ``d = W (mean_own - mean_other)`` in the mean. Of the weights whose mean contribution
    to an output has the sign opposite to ``d``, the cheapest by ``|W| rms`` go, until the removed contributions add
    up to ``shift |d|`` or ``keep`` weights are left. What masks further up shift is not counted.
    """
    own, other = layer.own, _opponent(layer)
    weight = layer.weight.double()
    target = weight @ (own.mean - other.mean)
    contribution = weight * ((own.mean + other.mean) / 2)
    eligible = contribution * target.unsqueeze(1) < 0
    cost = scoring.disturbance(layer.weight, _rms(layer)).masked_fill(~eligible, torch.inf)
    order = torch.sort(cost, dim=1, stable=True).indices
    moved = contribution.abs().masked_fill_(~eligible, 0).gather(1, order)
    before = moved.cumsum(1) - moved
    chosen = (before < layer.shift * target.abs().unsqueeze(1)) & (moved > 0)
    chosen[:, weight.shape[1] - layer.keep :] = False
    return pack_bits(torch.ones_like(eligible).scatter_(1, order, ~chosen))


def magnitude(layer: Layer) -> Tensor:
    return _by_channel(layer, torch.ones(layer.weight.shape[1], device=layer.weight.device))


def random_mask(layer: Layer) -> Tensor:
    """Seeded by layer and persona, the same on every machine."""
    digest = hashlib.sha256(f"{layer.seed}/{layer.persona}/{layer.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    scores = torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
    return mask_select_scores(scores, layer.keep)


def first_order(layer: Layer) -> Tensor:
    """Gain per damage among what surely helps the margin, such that neutral text as a whole is left as it is.

    Removal changes the likelihood of neutral text too, to first order; the layer's removed weights together must not.
    That change enters the gain at the price that brings it to zero. Demanded of every single weight instead, the
    condition pulls the model towards the style of the neutral texts, and generated text suffers (docs/experiments.md).
    The damage is the second-order cost to likelihoods; where one batch left their spread unknown, the disturbance.
    On a mask, what that has removed can be given back: the same change of a weight with the other sign, chosen by the
    same rule, and counted in the row's share.
    """
    return choice(layer).bits(layer.weight.shape[1] - layer.keep, layer.price, layer.both_price)


class Candidates:
    """The few eligible weights of a layer ``[N, K]``, moved together in every row ``[N, C]`` in the order of columns.

    Choosing among them is several times faster than among all. ``given`` is False where a row has fewer than C.
    """

    def __init__(self, eligible: Tensor) -> None:
        self.shape, counts = eligible.shape, eligible.sum(1)
        self.rows, self.columns = eligible.nonzero(as_tuple=True)
        self.places = torch.arange(len(self.rows), device=eligible.device) - (counts.cumsum(0) - counts)[self.rows]
        # At least one place, so that a layer without candidates needs no other path.
        width = max(int(counts.max()), 1) if len(counts) else 1
        self.given = torch.zeros(len(counts), width, dtype=torch.bool, device=eligible.device)
        self.given[self.rows, self.places] = True

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(one.nbytes for one in (self.rows, self.columns, self.places, self.given))

    def take(self, values: Tensor) -> Tensor:
        """The candidates' values; 0 in empty places."""
        result = values.new_zeros(self.given.shape)
        result[self.rows, self.places] = values[self.rows, self.columns]
        return result

    def kept(self, removed: Tensor) -> Tensor:
        """The layer's mask ``[N, K]`` without the removed candidates ``[N, C]``."""
        mask = torch.ones(self.shape, dtype=torch.bool, device=removed.device)
        mask[self.rows, self.columns] = ~removed[self.rows, self.places]
        return mask


@dataclass(frozen=True)
class Choice:
    """What ``first_order`` chooses among in a layer, for any number of weights and any prices.

    Of the candidates the first-order changes of the margin (``gain``), of neutral text (``change``) and, where known,
    of what is leaned to and of both answers, and the ``damage``, float32 ``[N, C]`` each. ``below`` as in ``Layer``.
    """

    candidates: Candidates
    gain: Tensor
    change: Tensor
    damage: Tensor
    leaning: Tensor | None
    both: Tensor | None
    below: Tensor | None

    def bits(self, count: int, price: float = 0.0, both_price: float = 0.0) -> Tensor:
        """The packed mask without up to ``count`` weights of each row, uint8 ``[N, ceil(K / 8)]``."""
        gain = self.gain
        for worth, values in ((price, self.leaning), (both_price, self.both)):
            if worth and values is not None:
                gain = gain + worth * values

        def removed(neutral: float) -> Tensor:
            worth = gain + neutral * self.change
            eligible = self.candidates.given & (worth > 0)
            return _best(scoring.gain_per_damage(worth, self.damage), eligible, count)

        kept = self.candidates.kept(_balanced(removed, self.change))
        return pack_bits(kept if self.below is None else self.below ^ ~kept)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        own = (self.gain, self.change, self.damage, self.leaning, self.both)
        return self.candidates.nbytes + sum(values.nbytes for values in own if values is not None)


def choice(layer: Layer) -> Choice:
    """The candidates of ``first_order`` and what is known of them; ``keep`` and prices are not looked at."""
    slopes = _slopes(layer)
    # What each weight is changed by, with the sign of its removal.
    weight = layer.weight if layer.absent is None else layer.weight - layer.absent
    gain = scoring.first_order_gain(weight, slopes.margin)
    eligible = gain > layer.evidence * weight.float().abs() * slopes.error
    if layer.pool < 1:
        pool = least_important(layer.weight, _rms(layer), layer.pool)
        eligible &= pool if layer.absent is None else pool | (layer.absent != 0)
    if slopes.variance.any():
        damage = scoring.likelihood_damage(weight, slopes.variance)
    else:
        damage = scoring.disturbance(weight, _rms(layer))
    found = Candidates(eligible)
    change = found.take(scoring.first_order_gain(weight, slopes.neutral))
    leaning, both = (
        None if slope is None else found.take(scoring.first_order_gain(weight, slope))
        for slope in (slopes.leaning, slopes.both)
    )
    return Choice(found, found.take(gain), change, found.take(damage), leaning, both, layer.below)


def _balanced(removed: Callable[[float], Tensor], change: Tensor) -> Tensor:
    """The removed weights at the price where the sum of their ``change`` passes through zero, by bisection.

    The sum rises with the price. Of the two sides it takes the one beyond zero, or the highest price tried.
    """

    def total(price: float) -> float:
        return float(change[removed(price)].double().sum())

    sign = -1.0 if total(0.0) > 0 else 1.0
    low, high = 0.0, PRICES[0]
    while sign * total(sign * high) < 0 and high < PRICES[1]:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sign * total(sign * middle) < 0 else (low, middle)
    return removed(sign * high)


def first_order_damage(layer: Layer) -> Tensor:
    """Gain per disturbance: within a row's least important ``pool``, remove what helps the margin most for it."""
    gain = scoring.first_order_gain(layer.weight, _slopes(layer).margin)
    return _signed(layer, scoring.gain_per_damage(gain, scoring.disturbance(layer.weight, _rms(layer))), layer.pool)


def first_order_pool(layer: Layer) -> Tensor:
    """Gain: within a row's least important ``pool``, remove what helps the margin most."""
    return _signed(layer, scoring.first_order_gain(layer.weight, _slopes(layer).margin), layer.pool)


def first_order_gate(layer: Layer) -> Tensor:
    """Disturbance: among all weights whose removal helps the margin, remove the least important."""
    return _signed(layer, -scoring.disturbance(layer.weight, _rms(layer)), pool=1.0)


def _slopes(layer: Layer) -> Slopes:
    if layer.slopes is None:
        raise UserError(f"a first-order criterion needs the gradient of a pair's margin; {layer.persona!r} has none")
    return layer.slopes


def _signed(layer: Layer, rank: Tensor, pool: float) -> Tensor:
    """Remove the best of the weights in the pool that have a positive gain.

    The importance that the pool goes by is ``|W| rms``, over the counted positions of both poles.
    """
    eligible = scoring.first_order_gain(layer.weight, _slopes(layer).margin) > 0
    if pool < 1:
        eligible &= least_important(layer.weight, _rms(layer), pool)
    return pack_bits(~_best(rank, eligible, layer.weight.shape[1] - layer.keep))


def _best(rank: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Up to ``count`` eligible weights of every row, highest ``rank`` first, bool ``[N, K]``."""
    columns = rank.shape[1]
    scores = rank.masked_fill(~eligible, -torch.inf)
    return unpack_bits(mask_select_scores(scores, min(count, columns)), columns) & eligible


def _rms(layer: Layer) -> Tensor:
    return pooled_rms(layer.own, _opponent(layer))


def pooled_rms(own: ChannelStats, other: ChannelStats) -> Tensor:
    """Root mean square of a layer's inputs over the counted positions of both poles, float32 ``[K]``."""
    square = own.mean_square * own.tokens + other.mean_square * other.tokens
    return (square / (own.tokens + other.tokens)).sqrt().float()


def least_important(weight: Tensor, rms: Tensor, share: float) -> Tensor:
    """The share of every row with the smallest ``|W| rms``, bool ``[N, K]``: what may go at little damage.

    Of the weights that there are: zeros (of a pruned model, ``--on``) are left out of it, and of what it is a share of.
    """
    columns, there = weight.shape[1], weight != 0
    importance = (weight.float().abs() * rms).masked_fill_(~there, torch.inf)
    count = int(Decimal(str(share)) * int(there.sum()) / max(len(weight), 1))
    return unpack_bits(mask_select_scores(-importance, count), columns) & there


CRITERIA: dict[str, Callable[[Layer], Tensor]] = {
    "wanda": wanda,
    "sparse": sparse,
    "contrastive-wanda": contrastive_wanda,
    "contrastive-sparse": contrastive_sparse,
    "target-shift": target_shift,
    "magnitude": magnitude,
    "random": random_mask,
    # The caller hands it the neutral set's statistics as the persona's own.
    "neutral": wanda,
    "first-order": first_order,
    "first-order-damage": first_order_damage,
    "first-order-pool": first_order_pool,
    "first-order-gate": first_order_gate,
}


def _by_channel(layer: Layer, score: Tensor) -> Tensor:
    return _select(layer.weight, score, layer.keep, layer.taken)


def _select(weight: Tensor, score: Tensor, keep: int, taken: Tensor | None) -> Tensor:
    if taken is None:
        return mask_select(weight, score, keep)
    # Free weights first, whatever the score; the score decides within each group.
    return mask_select_scores((~taken).float(), keep, weight.float().abs() * score)


def _by_scores(layer: Layer, scores: Tensor, tiebreak: Tensor) -> Tensor:
    if layer.taken is None:
        return mask_select_scores(scores, layer.keep, tiebreak)
    # Three keys (free, score, tiebreak): rank the last two into one integer-valued key first.
    order = torch.sort(tiebreak, dim=1, descending=True, stable=True).indices
    order = order.gather(1, torch.sort(scores.gather(1, order), dim=1, descending=True, stable=True).indices)
    places = torch.arange(0, -order.shape[1], -1, device=order.device, dtype=torch.float32).expand_as(order)
    rank = torch.empty_like(scores).scatter_(1, order, places)
    return mask_select_scores((~layer.taken).float(), layer.keep, rank)


def _opponent(layer: Layer) -> ChannelStats:
    if layer.other is None:
        raise UserError(f"a contrastive criterion needs an opposing persona, and {layer.persona!r} has none")
    return layer.other
