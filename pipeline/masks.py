"""Sets of persona masks: density, overlap, algebra. A mask is True where a weight is kept."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kernels.ops.pack_bits import pack_bits, unpack_bits

_ONES = torch.tensor([bin(value).count("1") for value in range(256)], dtype=torch.int64)


@dataclass
class PersonaMasks:
    """Packed masks of any number of personas over the same layers.

    ``shapes[layer]`` is ``(N, K)``; ``bits[persona][layer]`` is uint8 ``[N, ceil(K / 8)]``; ``manifest``
    says where they come from (``pipeline.store``).
    """

    shapes: dict[str, tuple[int, int]]
    bits: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def personas(self) -> tuple[str, ...]:
        return tuple(self.bits)

    def mask(self, persona: str, layer: str) -> Tensor:
        """Bool ``[N, K]``, True = kept."""
        return unpack_bits(self._of(persona)[layer], self.shapes[layer][1])

    def kept(self, persona: str) -> dict[str, int]:
        """Number of weights kept, by layer."""
        return {layer: count_kept(bits) for layer, bits in self._of(persona).items()}

    def density(self, persona: str, layer: str | None = None) -> float:
        """Share of weights kept, in one layer or in all."""
        layers = self.shapes if layer is None else {layer: self.shapes[layer]}
        return density((count_kept(self._of(persona)[name]) for name in layers), layers)

    def jaccard(self, a: str, b: str, layer: str | None = None) -> float:
        """Kept by both over kept by either; 1 for two empty masks."""
        both, either = self._both_either(a, b, layer)
        return both / either if either else 1.0

    def chance_jaccard(self, a: str, b: str, layer: str | None = None) -> float:
        """What two independent random masks of the same densities would have: d_a d_b / (d_a + d_b - d_a d_b)."""
        both = either = 0.0
        for name in self.shapes if layer is None else (layer,):
            size = self.shapes[name][0] * self.shapes[name][1]
            x, y = self.density(a, name), self.density(b, name)
            both += size * x * y
            either += size * (x + y - x * y)
        return both / either if either else 1.0

    def difference_share(self, a: str, b: str, layer: str | None = None) -> float:
        """Share of weights that only one of the two keeps (the paper's mask difference, T. 2)."""
        both, either = self._both_either(a, b, layer)
        layers = self.shapes if layer is None else {layer: self.shapes[layer]}
        return (either - both) / max(sum(rows * columns for rows, columns in layers.values()), 1)

    def union(self, name: str, personas: Iterable[str]) -> "PersonaMasks":
        """A mask that keeps what any of the personas keeps."""
        return self._combine(name, personas, torch.bitwise_or)

    def intersection(self, name: str, personas: Iterable[str]) -> "PersonaMasks":
        """A mask that keeps what all of the personas keep: it unites what they remove."""
        return self._combine(name, personas, torch.bitwise_and)

    def difference(self, name: str, a: str, b: str) -> "PersonaMasks":
        """A mask that keeps what ``a`` keeps and ``b`` does not."""
        return self._combine(name, (a, b), lambda x, y: x & ~y)

    def mix(self, name: str, a: str, b: str, share: float, seed: int = 0) -> "PersonaMasks":
        """Appendix F: what both keep, and of what only one keeps ``share`` of a's and ``1 - share`` of b's.

        Row by row, the counts rounded half up, the choice seeded: a row keeps as many weights as a and b do
        where these agree on the number.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        generator = torch.Generator().manual_seed(seed)
        mixed = {}
        for layer in self.shapes:
            x, y = self.mask(a, layer), self.mask(b, layer)
            only_a, only_b = x & ~y, y & ~x
            counts = (share * only_a.sum(1) + 0.5).floor().long()
            chosen = _random_subset(only_a, counts, generator)
            chosen |= _random_subset(only_b, only_b.sum(1) - (share * only_b.sum(1) + 0.5).floor().long(), generator)
            mixed[layer] = pack_bits((x & y) | chosen)
        return self._new(name, mixed)

    def random_like(
        self,
        persona: str,
        seed: int,
        name: str,
        pool: Callable[[str], Tensor] | None = None,
        base: "PersonaMasks | None" = None,
        *,
        rows: bool = False,
    ) -> "PersonaMasks":
        """A random mask that keeps as many weights in every layer as ``persona`` does: the control.

        They are spread evenly over the rows; with ``rows`` every row loses as many as under the persona's mask, whose
        choice of outputs the random mask then shares. ``pool(layer)`` (bool ``[N, K]``) says which weights may go, all
        by default. Of what ``base`` (of one persona) removes, as many weights come back as under the persona's mask.
        Raises ValueError where the pool holds fewer than have to go.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for layer in self.shapes:
            mask = self.mask(persona, layer)
            below = base.mask(base.personas[0], layer) if base and layer in base.shapes else torch.ones_like(mask)
            removed, returned = (below & ~mask).sum(1), (~below & mask).sum(1)
            candidates = below if pool is None or not removed.any() else pool(layer).to(mask.device) & below
            room = candidates.sum(1)
            if (removed > room).any() if rows else removed.sum() > room.sum():
                raise ValueError(f"layer {layer}: {persona!r} removes more weights than its pool holds")
            if not rows:
                removed = _spread(int(removed.sum()), room, generator)
                returned = _spread(int(returned.sum()), (~below).sum(1), generator)
            kept = below & ~_random_subset(candidates, removed, generator)
            if returned.any():
                kept |= _random_subset(~below, returned, generator)
            drawn[layer] = pack_bits(kept)
        return self._new(name, drawn)

    def __or__(self, other: "PersonaMasks") -> "PersonaMasks":
        """The personas of both. Raises ValueError if layers differ or a persona is in both."""
        if self.shapes != other.shapes:
            raise ValueError("masks over different layers cannot be put together")
        if twice := set(self.bits) & set(other.bits):
            raise ValueError(f"personas in both: {', '.join(sorted(twice))}")
        return PersonaMasks(self.shapes, {**self.bits, **other.bits}, self.manifest)

    def _combine(
        self, name: str, personas: Iterable[str], operation: Callable[[Tensor, Tensor], Tensor]
    ) -> "PersonaMasks":
        parts = [self._of(p) for p in personas]
        if not parts:
            raise ValueError("no personas given")
        return self._new(name, {layer: reduce(operation, (p[layer] for p in parts)) for layer in self.shapes})

    def _new(self, name: str, bits: dict[str, Tensor]) -> "PersonaMasks":
        return PersonaMasks(self.shapes, {name: bits}, self.manifest)

    def _both_either(self, a: str, b: str, layer: str | None) -> tuple[int, int]:
        x, y = self._of(a), self._of(b)
        layers = self.shapes if layer is None else (layer,)
        both, either = (sum(count_kept(of(x[n], y[n])) for n in layers) for of in (torch.bitwise_and, torch.bitwise_or))
        return both, either

    def _of(self, persona: str) -> dict[str, Tensor]:
        if persona not in self.bits:
            raise KeyError(f"unknown persona {persona!r}; known are {', '.join(self.bits)}")
        return self.bits[persona]


def count_kept(bits: Tensor) -> int:
    """Number of set bits of packed masks (uint8)."""
    return int(torch.bincount(bits.flatten(), minlength=256).cpu() @ _ONES)


def density(kept: Iterable[int], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Share of the weights of all layers that is kept."""
    return sum(kept) / max(sum(rows * columns for rows, columns in shapes.values()), 1)


def _spread(total: int, room: Tensor, generator: torch.Generator) -> Tensor:
    """``total`` over rows, as evenly as their ``room`` (int64 ``[N]``) allows; the rest goes to random ones."""
    counts = torch.zeros_like(room)
    while total:
        open_rows = (room > counts).nonzero().flatten()
        share = total // len(open_rows)
        if not share:
            counts[open_rows[torch.randperm(len(open_rows), generator=generator)[:total]]] += 1
            break
        more = (room - counts)[open_rows].clamp(max=share)
        counts[open_rows] += more
        total -= int(more.sum())
    return counts


def _random_subset(candidates: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """In every row, ``counts`` random members of ``candidates`` (bool ``[N, K]``)."""
    # float64: no two keys of a row are equal in practice, so a threshold keeps exactly the count.
    keys = torch.rand(candidates.shape, generator=generator, dtype=torch.float64).masked_fill(~candidates, -1)
    ranked = keys.sort(dim=1, descending=True).values
    last = ranked.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))
    return (keys >= last) & (counts > 0).unsqueeze(1) & candidates
