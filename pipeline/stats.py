"""Activation statistics per persona and input channel: sums that add up over samples, batches and devices.

Everything is float64. Sums of disjoint sample sets add; weighted sums compose personas (the sixteen
types, mixtures). Field meanings: ``kernels.ops.activation_stats``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.ops.activation_stats import FIELDS
from pipeline.errors import UserError
from pipeline.sites import Site

SAMPLES, TOKENS, SINKS = range(3)
"""Columns of ``ActivationStats.counts``."""


@dataclass(frozen=True)
class ChannelStats:
    """What one persona's samples say about one input: every tensor is float64 ``[K]``.

    ``tokens`` is the number of counted tokens, ``mean_abs`` is A of eq. 2, ``mean_square`` its squared
    counterpart (Wanda's norm squared over the number of tokens), ``mu`` and ``variance`` (population) are over
    sequences of the per-sequence RMS (eq. 8), ``mean`` is signed, ``sink_square`` is the mean square at position 0.
    """

    tokens: float
    mean_abs: Tensor
    mean_square: Tensor
    mean: Tensor
    mu: Tensor
    variance: Tensor
    sink_square: Tensor


@dataclass
class ActivationStats:
    """Sums for P personas at every site.

    ``sums[site]`` is float64 ``[P, 8, K]``; ``counts`` float64 ``[P, 3]``: samples, counted tokens and
    sink tokens (fractional after a weighted composition). A routed site (an expert's) has counts of its own in
    ``routed``, of the same shape: the samples and tokens that reached it.
    """

    personas: tuple[str, ...]
    sites: tuple[Site, ...]
    sums: dict[str, Tensor]
    counts: Tensor
    routed: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls, personas: Iterable[str], sites: Iterable[Site], device: torch.device | str = "cpu"
    ) -> "ActivationStats":
        names, places = tuple(personas), tuple(sites)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        sums = {site.name: empty(len(names), len(FIELDS), site.width) for site in places}
        routed = {site.name: empty(len(names), 3) for site in places if site.routed}
        return cls(names, places, sums, empty(len(names), 3), routed)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that adds up over samples, by the name it has on disk."""
        routed = {f"counts/{name}": counts for name, counts in self.routed.items()}
        return {"counts": self.counts, **routed, **{f"sums/{name}": sums for name, sums in self.sums.items()}}

    def to(self, device: torch.device | str) -> "ActivationStats":
        """The same on another device."""
        sums, routed = ({n: t.to(device) for n, t in of.items()} for of in (self.sums, self.routed))
        return ActivationStats(self.personas, self.sites, sums, self.counts.to(device), routed)

    def merge(self, other: "ActivationStats") -> "ActivationStats":
        """Add the sums of disjoint samples in place. Raises ValueError if personas or sites differ."""
        if self.personas != other.personas or self.sites != other.sites:
            raise ValueError("statistics of different personas or layers cannot be merged")
        theirs = other.tensors
        for name, tensor in self.tensors.items():
            tensor += theirs[name]
        return self

    def compose(self, recipes: Mapping[str, Iterable[tuple[str, float]]]) -> "ActivationStats":
        """Statistics of personas united by weight, ``{"INTJ": [("introvert", 1.0), ...]}``: the weighted sums."""
        weights = torch.zeros(len(recipes), len(self.personas), dtype=torch.float64, device=self.counts.device)
        for row, parts in enumerate(recipes.values()):
            for persona, weight in parts:
                weights[row, self.personas.index(persona)] += weight
        sums = {name: torch.einsum("rp,pfk->rfk", weights, value) for name, value in self.sums.items()}
        routed = {name: weights @ counts for name, counts in self.routed.items()}
        return ActivationStats(tuple(recipes), self.sites, sums, weights @ self.counts, routed)

    def select(self, personas: Iterable[str]) -> "ActivationStats":
        """The statistics of some personas, in the order given."""
        return self.compose({name: [(name, 1.0)] for name in personas})

    def concatenate(self, other: "ActivationStats") -> "ActivationStats":
        """The personas of both, measured at the same sites."""
        if self.sites != other.sites:
            raise ValueError("statistics of different layers cannot be put together")
        sums = {name: torch.cat([value, other.sums[name]]) for name, value in self.sums.items()}
        routed = {name: torch.cat([counts, other.routed[name]]) for name, counts in self.routed.items()}
        counts = torch.cat([self.counts, other.counts])
        return ActivationStats(self.personas + other.personas, self.sites, sums, counts, routed)

    def channels(self, persona: str, site: str) -> ChannelStats:
        """Means of one persona at one site. Raises UserError if it has no counted token."""
        row = self.personas.index(persona)
        return self._means(persona, self.sums[site][row], self.routed.get(site, self.counts)[row])

    def pooled(self, persona: str, sites: Iterable[str]) -> ChannelStats:
        """The means over several routed sites together (all experts of a layer): their sums and counts added."""
        row, names = self.personas.index(persona), list(sites)
        sums = torch.stack([self.sums[name][row] for name in names]).sum(0)
        return self._means(persona, sums, torch.stack([self.routed[name][row] for name in names]).sum(0))

    def tokens(self, persona: str, site: str) -> float:
        """Counted tokens of one persona at one site."""
        return float(self.routed.get(site, self.counts)[self.personas.index(persona), TOKENS])

    def _means(self, persona: str, sums: Tensor, counts: Tensor) -> ChannelStats:
        samples, tokens, sinks = counts.tolist()
        if samples <= 0 or tokens <= 0:
            raise UserError(f"persona {persona!r} has no counted token; see --tokens")
        rms, ms, square, magnitude, signed, sink_square, _, _ = sums
        mu = rms / samples
        return ChannelStats(
            tokens=tokens,
            mean_abs=magnitude / tokens,
            mean_square=square / tokens,
            mean=signed / tokens,
            mu=mu,
            # Cancellation can leave a rounding error below zero for a channel that never varies.
            variance=(ms / samples - mu.square()).clamp(min=0),
            sink_square=sink_square / max(sinks, 1),
        )
