"""Choose how much each persona's mask removes by what it may cost: the model's own text, and the persona's answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.apart import margin_changes, vanishing
from pipeline.building import build_masks
from pipeline.cli import note
from pipeline.config import WHITENED, CalibrateConfig
from pipeline.data.catalogue import Catalogue, neutral_set
from pipeline.data.forms import Item
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter
from pipeline.errors import UserError
from pipeline.leaning import BOTH_PRICE, Line, levelled, line_of
from pipeline.likelihood import answer_distributions, answer_scores, divergence
from pipeline.masks import PersonaMasks
from pipeline.stacking import Base, under

NEUTRAL_TEXTS = 64
"""Neutral pairs that the gradient of neutral text is measured on; of the others, ``PROBE_TEXTS`` measure the cost."""
PROBE_TEXTS = 48
STEPS, FIRST, PROBES, CLOSE = 64, 48, 7, 0.85
"""The share removed is found in 64ths of ``--sparsity``, from at most so many measurements, the first at 48; a cost of
at least this part of the budget ends the search."""
POWER = 1.8
"""Cost grows nearly as the square of what is removed; two measurements know better."""


@dataclass(frozen=True)
class Fitted:
    """A persona's masks, the factor on ``--sparsity`` that made them, their relative rise in perplexity, and the prices
    of what they lean to and of both answers (``pipeline.leaning``) and of other pairs' margins (``pipeline.apart``)."""

    masks: PersonaMasks
    factor: Decimal
    increase: float
    price: float = 0.0
    both_price: float = 0.0
    apart: dict[str, float] = field(default_factory=dict)


def fit(
    persona: str,
    model: Any,
    stats: Any,
    catalogue: Any,
    config: CalibrateConfig,
    gradients: Any,
    increase: Callable[[PersonaMasks], float],
    base: Base | None = None,
    line: Callable[[PersonaMasks], Line] | None = None,
) -> Fitted:
    """One persona's masks within the budget, on top of ``base``; ``increase`` is ``rise``; ``line`` is
    ``line_under``, where it is known what the persona's answers lean to.

    For masks that are kept apart from other pairs, the prices of these come first, at the search's first factor. Masks
    that lean to one of two answers are levelled before their cost is measured; if nothing is within the budget so, both
    answers get a price too. Where nothing is within the budget, UserError is raised if the user named it; the
    default one takes the least and says so.
    """
    build = partial(build_masks, model, stats, catalogue, config, gradients, only=persona, base=base)
    named = config.max_perplexity_increase is not None
    prices: dict[Decimal, float] = {}
    both_price = 0.0
    apart: dict[str, float] = {}
    if gradients is not None and gradients.others[persona]:
        apart = _unmoved(persona, gradients, build, model, base)
        build = partial(build, apart=apart)
    if config.criterion == WHITENED:
        build = partial(build, known={})

    def made(factor: Decimal) -> PersonaMasks:
        if line is None:
            return build(factor=factor)
        best: list[tuple[PersonaMasks, Line]] = []

        def off(price: float) -> float:
            masks = build(factor=factor, price=price, both_price=both_price)
            found = line(masks)
            # As ``levelled`` decides; a model's masks are too large to keep all that are tried.
            if not best or abs(found.off) < abs(best[0][1].off):
                best[:] = [(masks, found)]
            return found.off

        # The price of one factor is near that of another.
        prices[factor] = levelled(off, next(reversed(prices.values()), 0.0))
        ((masks, one),) = best
        note(f"{persona}: {factor} of the sparsity leans by {one.off:+.2f} ({one.first:+.1f}/{one.second:+.1f} nats)")
        return masks

    def search(strict: bool) -> Fitted:
        return largest_within(made, increase, config.budget, strict=strict)

    try:
        one = search(named or line is not None)
    except UserError:
        if line is None:
            raise
        note(f"{persona}: nothing levelled is within the budget; both answers' likelihood counts now")
        both_price = BOTH_PRICE
        prices.clear()
        one = search(named)
    note(f"{persona}: removes {one.factor} of the sparsity")
    return replace(one, price=prices.get(one.factor, 0.0), both_price=both_price, apart=apart)


def _unmoved(
    persona: str, gradients: Any, build: Callable[..., PersonaMasks], model: Any, base: Base | None
) -> dict[str, float]:
    """The prices of other pairs' margins at which the persona's masks leave them as they are, to first order."""
    others = gradients.others[persona]

    def changes(prices: Tensor) -> Tensor:
        masks = build(factor=Decimal(FIRST) / STEPS, apart=dict(zip(others, prices.tolist(), strict=True)))
        return margin_changes(masks, (persona, *others), model, gradients, base)

    prices, found = vanishing(changes, len(others))
    change = ", ".join(f"{other} {value:+.2f}" for other, value in zip(others, found[1:].tolist(), strict=True))
    note(f"{persona}: to first order, its own margin changes by {found[0]:+.2f}, others' by {change}")
    return dict(zip(others, prices.tolist(), strict=True))


def largest_within(
    build: Callable[[Decimal], PersonaMasks],
    increase: Callable[[PersonaMasks], float],
    limit: float,
    *,
    strict: bool = True,
) -> Fitted:
    """The largest factor found in (0, 1] whose masks raise perplexity by at most ``limit``.

    Cost need not rise with every weight; what is returned has been measured to hold. If nothing that was tried does,
    raises UserError, or without ``strict`` returns the smallest.
    """
    low, high, best, step = 0, STEPS + 1, None, FIRST
    costs: dict[int, float] = {}
    for _ in range(PROBES):
        factor = Decimal(step) / STEPS
        masks = build(factor)
        seen = costs[step] = increase(masks)
        note(f"{', '.join(masks.personas)}: {factor} of the sparsity raises perplexity by {seen:.1%}")
        if seen <= limit:
            low, best = step, Fitted(masks, factor, seen)
            if step == STEPS or seen >= CLOSE * limit:
                break
        else:
            high = step
        if high - low <= 1:
            break
        step = _between(low, high, costs, limit)
    if best is None:
        what = f"{factor} of --sparsity still raises the perplexity of {', '.join(masks.personas)!r} by {seen:.1%}"
        if strict:
            raise UserError(f"--max-perplexity-increase {limit}: {what}; allow more, or lower --sparsity or --pool")
        note(f"{what}, more than the default {limit:.0%}; it is the least there is")
        best = Fitted(masks, factor, seen)
    return best


def _between(low: int, high: int, costs: dict[int, float], limit: float) -> int:
    """The next step to try, strictly between two, where a power law through what was measured meets the budget."""
    aim, below, above = 0.93 * limit, costs.get(low, 0.0), costs.get(high)
    if above is None:
        guess = low * (aim / below) ** (1 / POWER) if below > 0 else STEPS
    elif not math.isfinite(above) or (low and below < limit / 10):
        guess = (low + high) // 2
    else:
        power = math.log(above / below) / math.log(high / low) if low else POWER
        guess = high * (aim / above) ** (1 / power)
    return min(max(round(guess), low + 1), high - 1)


def rise(
    model: Any, tokenizer: Any, catalogue: Catalogue, config: CalibrateConfig, base: Base | None = None
) -> Callable[[PersonaMasks], float]:
    """Measures the relative rise in perplexity under one persona's masks; the larger one of two, or one that is
    beyond the budget. ``base`` has pruned ``model``, which is what they are held against.

    On text as the unmasked model writes it: ``exp(D) - 1`` with the divergence ``D`` of the masked from the unmasked
    model over the answers of the shipped neutral pairs that no gradient has seen. (Perplexity of given texts falls
    under a mask that happens to like their style.) And on the persona's own calibration answers, which a mask should
    make likelier and not only the opponent's less likely. Holds 4 bytes per answer token and word of the vocabulary.
    """
    prompter = Prompter(tokenizer)
    sizes: dict[str, Any] = {
        "batch_tokens": config.batch_tokens,
        "pad": tokenizer.pad_token_id,
        "undivided": config.undivided,
    }

    def encode(items: list[Item]) -> list[Encoded]:
        texts = [prompter.encode(item.question, item.matching) for item in items]
        return [
            Encoded(t.ids[: config.max_length], t.answer, t.question) for t in texts if t.answer < config.max_length
        ]

    def mean(texts: list[Encoded], asked: Any) -> float:
        return sum(score.mean for score in answer_scores(asked, texts, **sizes)) / len(texts)

    items = neutral_set().split("calibration")
    drawn = set(draw(items, min(config.samples or NEUTRAL_TEXTS, NEUTRAL_TEXTS), config.seed))
    neutral = encode(draw([item for item in items if item not in drawn], PROBE_TEXTS, config.seed))
    unmasked = answer_distributions(model, neutral, **sizes)
    own: dict[str, tuple[list[Encoded], float]] = {}

    def increase(masks: PersonaMasks) -> float:
        (persona,) = masks.personas
        if persona not in own:
            texts = encode(own_items(persona, catalogue, config))
            own[persona] = texts, mean(texts, model)
        texts, before = own[persona]
        with under(model, masks, base) as persona_model:
            other = math.expm1(min(divergence(unmasked, persona_model, neutral, **sizes), 100.0))
            if other > config.budget:
                return other
            return max(math.expm1(min(before - mean(texts, persona_model), 100.0)), other)

    return increase


def line_under(
    model: Any, tokenizer: Any, catalogue: Catalogue, config: CalibrateConfig, base: Base | None, persona: str
) -> Callable[[PersonaMasks], Line] | None:
    """Measures where a pole's masks draw the line between its two answers, on its calibration items; None where there
    are not two."""
    items = own_items(persona, catalogue, config)
    sizes = {"batch_tokens": config.batch_tokens, "pad": tokenizer.pad_token_id, "undivided": config.undivided}
    measure = line_of(items, Prompter(tokenizer), config.max_length, **sizes)

    def line(masks: PersonaMasks) -> Line:
        assert measure is not None
        with under(model, masks, base) as persona_model:
            return measure(persona_model)

    return line if measure else None


def own_items(persona: str, catalogue: Catalogue, config: CalibrateConfig) -> list[Item]:
    """Up to ``PROBE_TEXTS`` calibration items from the persona's side; of a composed persona, from its parts'."""
    parts = next((one.parts for one in catalogue.compositions if one.name == persona), ((persona, 1.0),))
    poles = [name for name, weight in parts if weight > 0]
    found: list[Item] = []
    for pole in poles:
        of = next(one for one in catalogue.sets if pole in one.poles)
        calibrated = draw(of.split("calibration"), config.samples, config.seed)[: max(1, PROBE_TEXTS // len(poles))]
        found += [item if pole == of.plus else item.swapped() for item in calibrated]
    return found
