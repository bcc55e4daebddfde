"""Experts that saw too few tokens are scored by the statistics of all experts of their layer together."""

from collections.abc import Iterable, Sequence

from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue
from pipeline.data.forms import NEUTRAL
from pipeline.experts import parameter_of
from pipeline.stats import ActivationStats, ChannelStats

BLIND = ("magnitude", "random")
"""Criteria that read no statistics."""


def compared(persona: str, catalogue: Catalogue, config: CalibrateConfig) -> tuple[str, str | None]:
    """The personas whose statistics score ``persona``: that which stands for it, and its opponent."""
    return NEUTRAL if config.criterion == "neutral" else persona, catalogue.opponents.get(persona)


class Pooled:
    """The statistics of all experts of a layer together; ``least`` counted tokens are enough to do without them."""

    def __init__(self, stats: ActivationStats, least: int) -> None:
        self.stats, self.least = stats, least
        self.groups: dict[str, list[str]] = {}
        for site in stats.sites:
            if site.routed:
                self.groups.setdefault(parameter_of(site.name), []).append(site.name)
        self._routed = {name for names in self.groups.values() for name in names}
        self._found: dict[tuple[str, str], ChannelStats] = {}

    def needed(self, site: str, personas: Iterable[str | None]) -> bool:
        """For all of the personas or for none: statistics of one expert and of all experts do not compare."""
        return site in self._routed and min(self.stats.tokens(p, site) for p in personas if p) < self.least

    def channels(self, personas: Sequence[str], site: str) -> list[ChannelStats]:
        """Every persona's means at a site, or over its layer's experts where they are needed."""
        of = self.of if self.needed(site, personas) else self.stats.channels
        return [of(persona, site) for persona in personas]

    def of(self, persona: str, layer: str) -> ChannelStats:
        """The means over all experts beside ``layer``. Raises UserError if no token reached any."""
        key = persona, parameter_of(layer)
        if key not in self._found:
            self._found[key] = self.stats.pooled(persona, self.groups[key[1]])
        return self._found[key]


def pooled_experts(stats: ActivationStats, catalogue: Catalogue, config: CalibrateConfig) -> dict[str, list[str]]:
    """By persona, the expert matrices that are scored by their layer's statistics. ``stats`` has every persona."""
    pooled = Pooled(stats, config.expert_tokens)
    found = {}
    for persona in catalogue.personas if config.criterion not in BLIND else ():
        both = compared(persona, catalogue, config)
        if few := [name for names in pooled.groups.values() for name in names if pooled.needed(name, both)]:
            found[persona] = few
    return found
