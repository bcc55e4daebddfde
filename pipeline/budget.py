"""Choose how much each persona's mask removes by what it may cost neutral text."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from pipeline.building import build_masks
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import neutral_set
from pipeline.data.module import draw
from pipeline.data.prompts import Encoded, Prompter
from pipeline.errors import UserError
from pipeline.likelihood import perplexity
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel

NEUTRAL_TEXTS = 64
"""Neutral pairs that the gradient of neutral text is measured on; of the others, ``PROBE_TEXTS`` measure the cost."""
PROBE_TEXTS = 48
STEPS, PROBES, CLOSE = 64, 7, 0.85
"""The share removed is found in 64ths of ``--sparsity``, from at most so many measurements; a cost of at least this
part of the budget ends the search."""


@dataclass(frozen=True)
class Fitted:
    """A persona's masks, the factor on ``--sparsity`` that made them, and their relative rise in perplexity."""

    masks: PersonaMasks
    factor: Decimal
    increase: float


def fit(
    persona: str,
    model: Any,
    stats: Any,
    catalogue: Any,
    config: CalibrateConfig,
    gradients: Any,
    increase: Callable[[PersonaMasks], float],
) -> Fitted:
    """One persona's masks within the budget; ``increase`` is ``neutral_cost``."""
    build = partial(build_masks, model, stats, catalogue, config, gradients, only=persona)
    one = largest_within(lambda factor: build(factor=factor), increase, config.budget)
    note(f"{persona}: {one.factor} of the sparsity, perplexity of neutral answers {one.increase:+.1%}")
    return one


def largest_within(
    build: Callable[[Decimal], PersonaMasks], increase: Callable[[PersonaMasks], float], limit: float
) -> Fitted:
    """The largest factor found in (0, 1] whose masks raise perplexity by at most ``limit``.

    Cost need not rise with every weight; what is returned has been measured to hold. Raises UserError if nothing
    that was tried does.
    """
    low, high, best, step = 0, STEPS + 1, None, STEPS
    for _ in range(PROBES):
        factor = Decimal(step) / STEPS
        masks = build(factor)
        seen = increase(masks)
        if seen <= limit:
            low, best = step, Fitted(masks, factor, seen)
            if step == STEPS or seen >= CLOSE * limit:
                break
        else:
            high = step
        if high - low <= 1:
            break
        # Cost grows about as the 3/2 power of what is removed, but can be negative first: a guess, then halvings.
        step = (low + high) // 2 if low else max(1, min(round(step * (0.93 * limit / seen) ** (2 / 3)), step - 1))
    if best is None:
        persona = ", ".join(masks.personas)
        raise UserError(
            f"--max-perplexity-increase {limit}: {factor} of --sparsity still raises the perplexity of {persona!r} "
            f"by {seen:.1%}; allow more, or lower --sparsity or --pool"
        )
    return best


def neutral_cost(model: Any, tokenizer: Any, config: CalibrateConfig) -> Callable[[PersonaMasks], float]:
    """Measures the relative rise in perplexity under one persona's masks.

    On the answers of the shipped neutral pairs that no gradient has seen, not on the texts of the evaluation.
    """
    items = neutral_set().split("calibration")
    drawn = set(draw(items, min(config.samples or NEUTRAL_TEXTS, NEUTRAL_TEXTS), config.seed))
    prompter = Prompter(tokenizer)
    unseen = draw([item for item in items if item not in drawn], PROBE_TEXTS, config.seed)
    texts = [prompter.encode(item.question, item.matching) for item in unseen]
    texts = [Encoded(t.ids[: config.max_length], t.answer, t.question) for t in texts if t.answer < config.max_length]
    sizes = {"batch_tokens": config.batch_tokens, "pad": tokenizer.pad_token_id}
    base = perplexity(model, texts, **sizes)

    def increase(masks: PersonaMasks) -> float:
        masked = PersonaModel(model, masks)
        try:
            (persona,) = masks.personas
            with masked.using(persona):
                return perplexity(masked, texts, **sizes) / base - 1
        finally:
            masked.detach()

    return increase
