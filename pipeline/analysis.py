"""What two masks have in common, layer by layer (paper: mask difference T. 2, overlap of related personas T. 13)."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from pipeline.data.catalogue import TYPES
from pipeline.masks import PersonaMasks

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Overlap:
    """Counts of weights over one or more layers: all, removed by a, by b, by both, and ``expected`` by both.

    ``expected`` is what two independent random choices of as many weights in every layer would share on average. The
    kept sets of two sparse masks are nearly equal whatever the masks are, so shares are of what is removed.
    """

    size: int
    removed_a: int
    removed_b: int
    removed_both: int
    expected: float

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(
            self.size + other.size,
            self.removed_a + other.removed_a,
            self.removed_b + other.removed_b,
            self.removed_both + other.removed_both,
            self.expected + other.expected,
        )

    @property
    def shares(self) -> tuple[float, float]:
        """Share of the weights that each of the two removes."""
        return self.removed_a / self.size, self.removed_b / self.size

    @property
    def difference(self) -> float:
        """Share of the weights that only one of the two keeps (T. 2)."""
        return (self.removed_a + self.removed_b - 2 * self.removed_both) / self.size

    @property
    def jaccard(self) -> float:
        """Removed by both over removed by either; 1 if neither removes anything."""
        return _ratio(self.removed_both, self.removed_a + self.removed_b - self.removed_both)

    @property
    def chance(self) -> float:
        """The same for ``expected``."""
        return _ratio(self.expected, self.removed_a + self.removed_b - self.expected)

    @property
    def lift(self) -> float | None:
        """Removed by both over ``expected``: 1 is chance; None where nothing is expected."""
        return self.removed_both / self.expected if self.expected else None


def overlaps(masks: PersonaMasks, a: str, b: str) -> dict[str, Overlap]:
    """The overlap of two personas in every layer. Raises KeyError for an unknown persona."""
    both = masks.intersection("both", (a, b)).kept("both")
    kept_a, kept_b = masks.kept(a), masks.kept(b)
    found = {}
    for layer, (rows, columns) in masks.shapes.items():
        size = rows * columns
        x, y = size - kept_a[layer], size - kept_b[layer]
        # Kept by neither: all but what either keeps.
        found[layer] = Overlap(size, x, y, size - (kept_a[layer] + kept_b[layer] - both[layer]), x * y / size)
    return found


def grouped(parts: Mapping[str, Overlap], key: Callable[[str], K]) -> dict[K, Overlap]:
    """Sums over the layers for which ``key`` of the name is the same, in order of their first."""
    sums: dict[K, Overlap] = {}
    for layer, part in parts.items():
        name = key(layer)
        sums[name] = sums[name] + part if name in sums else part
    return sums


@dataclass(frozen=True)
class Related:
    """Two personas and the overlap of what their masks remove; ``shared`` letters for two types, else None (T. 13)."""

    a: str
    b: str
    shared: int | None
    opposed: bool
    overlap: Overlap


def related(masks: PersonaMasks, opponents: Mapping[str, str]) -> list[Related]:
    """Every two personas of a run, in order."""
    found = []
    for a, b in combinations(masks.personas, 2):
        shared = sum(x == y for x, y in zip(a, b, strict=True)) if a in TYPES and b in TYPES else None
        whole = grouped(overlaps(masks, a, b), lambda _: "")[""]
        found.append(Related(a, b, shared, opponents.get(a) == b, whole))
    return found


def depth_of(layer: str) -> int | None:
    """The block's number in a layer's dotted name: 3 for ``model.layers.3.mlp.down_proj``; None without one."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def kind_of(layer: str) -> str:
    """What follows the block's number, ``mlp.down_proj``; the whole name without one."""
    parts = layer.split(".")
    place = next((n for n, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[place + 1 :])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
