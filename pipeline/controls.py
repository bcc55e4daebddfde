"""Control masks for a persona: what the same number of weights does when nothing but chance chooses them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config import FIRST_ORDER
from pipeline.criteria import least_important, pooled_rms
from pipeline.masks import PersonaMasks
from pipeline.pooling import Pooled
from pipeline.stacking import base_masks
from pipeline.stats import ActivationStats
from pipeline.store import STATISTICS, load_statistics


def add_random(model: Any, run: Path, pair: Any, draws: int, seed: int, *, rows: bool = False) -> list[dict[str, str]]:
    """Add ``draws`` random masks for each pole of a pair; returns their names by pole, one dictionary a draw.

    Each removes as many weights of every layer as the pole's mask, spread evenly over the rows, or with ``rows`` as
    many of every row: which outputs lose weights is a part of what the mask says. Against a first-order criterion they
    come from the pool that it chose from, the row's least important weights: any others would cost far more perplexity
    and make every criterion look good. Of what the mask below (``--on``) removes, they give as many back.
    """
    chosen, base = [], base_masks(model.masks.manifest["options"].get("on", ""))
    for _ in range(draws):
        names = {}
        for pole, other in ((pair.plus, pair.minus), (pair.minus, pair.plus)):
            number = len(model.masks.personas)
            names[pole] = f"random-{number}-{pole}"
            pool = _pool(model, run, pole, other, base)
            model.add(model.masks.random_like(pole, 1000 * seed + number, names[pole], pool, base, rows=rows))
        chosen.append(names)
    return chosen


def _pool(model: Any, run: Path, pole: str, other: str, base: PersonaMasks | None) -> Callable[[str], Tensor] | None:
    manifest = model.masks.manifest
    share = float(manifest["options"]["pool"])
    if manifest["criterion"] not in FIRST_ORDER or manifest["criterion"] == "first-order-gate" or share == 1:
        return None
    stats = run_statistics(run, manifest)
    site = {linear: site.name for site in stats.sites for linear in site.linears}
    pooled = Pooled(stats, manifest["options"].get("expert_tokens", 1))

    def pool(layer: str) -> Tensor:
        own, opponent = pooled.channels((pole, other), site[layer])
        weight = model.weight(layer).detach().cpu()
        if base:
            weight = weight * base.mask(base.personas[0], layer)
        return least_important(weight, pooled_rms(own, opponent), share)

    return pool


def run_statistics(run: Path, manifest: dict[str, Any]) -> ActivationStats:
    """The run's statistics, its composed personas beside the measured ones."""
    stats = load_statistics(run / STATISTICS)
    recipes = {name: [tuple(part) for part in parts] for name, parts in manifest["personas"]["compositions"].items()}
    return stats.concatenate(stats.compose(recipes)) if recipes else stats
