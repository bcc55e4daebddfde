"""The files of gradients in a run's folder."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.data.catalogue import Catalogue
from pipeline.data.forms import NEUTRAL

WEIGHTED = "weighted"
"""The folder of gradients whose answers count as ``pipeline.weighing`` says."""
ANSWERS = ("first-answer", "second-answer")
"""The folders of the gradients of ``pipeline.leaning``."""
AGAIN = "again"
"""The folder of what is made a second time for poles that repeat themselves under their masks, and of the reviews that
say so (``pipeline.revising``)."""
KINDS = ("error", "mean")
"""What is known of every layer's gradient, in the order of the file."""


def gradient_file(name: str) -> str:
    return f"gradient-{name}.safetensors"


def weighing_file(name: str) -> str:
    """Of ``pipeline.weighing``."""
    return f"weighing-{name}.json"


def review_file(name: str) -> str:
    """Of ``pipeline.revising``: of a first mask."""
    return f"review-{name}.json"


def second_review_file(name: str) -> str:
    """Of ``pipeline.revising``: of a second mask."""
    return f"second-review-{name}.json"


def revised(folder: Path) -> frozenset[str]:
    """The poles whose masks are chosen a second time, in a run's folder; none until all their gradients are there."""
    reviews = (json.loads(file.read_bytes()) for file in (folder / AGAIN).glob(review_file("*")))
    found = frozenset(one["pole"] for one in reviews if one["loops"])
    return found if all((folder / AGAIN / gradient_file(pole)).exists() for pole in found) else frozenset()


def returned(folder: Path) -> frozenset[str]:
    """The poles of a run's folder that repeat themselves more under their second masks, and keep their first ones."""

    def repeats(file: Path) -> float:
        return json.loads(file.read_bytes())["repetition"][1]

    again = folder / AGAIN
    looked_at = [pole for pole in revised(folder) if (again / second_review_file(pole)).exists()]
    return frozenset(p for p in looked_at if repeats(again / second_review_file(p)) > repeats(again / review_file(p)))


class Gradients:
    """The gradients in a run's folder, read layer by layer, for any persona of a catalogue.

    The gradient of a pole is that of its pair with its sign, or, of ``weighted`` answers, its own if it has one (that
    of the second time if it was revised), with as much of other margins as keeps it apart from them (``--apart``,
    ``--apart-yes-no``). Margins add, so the gradient
    of a composed persona is the weighted mean of its parts', and its squared error the sum of theirs.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, *, weighted: bool = False) -> None:
        self.folder = folder
        self._leaning, self._both = (
            {
                pole: [(f"{of}/{gradient_file(personas.plus)}", sign) for of, sign in zip(ANSWERS, signs, strict=True)]
                for personas in catalogue.sets
                for pole in personas.poles
            }
            for signs in ((1.0, -1.0), (0.5, 0.5))
        )
        self._plain: dict[str, list[tuple[str, float]]] = {}
        self._parts: dict[str, list[tuple[str, float]]] = {}
        self._beside: dict[str, list[tuple[str, float]]] = {}
        self.others: dict[str, tuple[str, ...]] = {}
        """By persona, the margins that it is kept apart from: of pairs, by their first pole, and of Yes over No."""
        again = revised(folder) if weighted else frozenset()
        for personas in catalogue.sets:
            within = f"{WEIGHTED}/" if weighted and personas.minus is not None else ""
            for pole, sign in zip(personas.poles, (1.0, -1.0), strict=False):
                self._plain[pole] = [(gradient_file(personas.plus), sign)]
                own = within + gradient_file(pole)
                has = pole == personas.plus or pole in again or (within and (folder / own).exists())
                name, factor = (pole, 1.0) if has else (personas.plus, sign)
                place, weighing = (f"{AGAIN}/", folder / AGAIN) if pole in again else (within, folder)
                self._parts[pole] = [(place + gradient_file(name), factor)]
                apart = json.loads((weighing / weighing_file(name)).read_bytes())["apart"] if within else {}
                self._beside[pole] = [(gradient_file(other), factor * one) for other, one in apart.items()]
                self.others[pole] = tuple(apart)
                self._plain |= {other: [(gradient_file(other), 1.0)] for other in apart}
        for composition in catalogue.compositions:
            parts = composition.parts
            total = sum(weight for _, weight in parts)
            for known in (self._plain, self._parts, self._beside, self._leaning, self._both):
                known[composition.name] = [(n, s * w / total) for p, w in parts for n, s in known[p]]
            within_it = {one.plus for one in catalogue.sets for part, _ in parts if part in one.poles}
            others = dict.fromkeys(other for part, _ in parts for other in self.others[part])
            self.others[composition.name] = tuple(other for other in others if other not in within_it)

    def of(self, persona: str, layer: str, prices: Mapping[str, float] | None = None) -> tuple[Tensor, Tensor]:
        """Gradient of the persona's margin and its standard error, float32 ``[N, K]``; with those of other pairs at
        ``prices``, by their first pole."""
        # A file is read once.
        weights: dict[str, float] = {}
        priced = [(gradient_file(other), price) for other, price in (prices or {}).items()]
        for file, weight in (*self._parts[persona], *self._beside[persona], *priced):
            weights[file] = weights.get(file, 0.0) + weight
        parts = list(weights.items())
        mean = self._sum(parts, layer)
        errors = [_times(self._read(file, f"error/{layer}"), abs(weight)) for file, weight in parts]
        return mean, errors[0] if len(errors) == 1 else _added([error.square() for error in errors]).sqrt_()

    def margin(self, persona: str, layer: str) -> Tensor:
        """Gradient of the persona's plain margin, all answers alike, float32 ``[N, K]``."""
        return self._sum(self._plain[persona], layer)

    def neutral(self, layer: str) -> Tensor:
        """Gradient of the likelihood of neutral text, float32 ``[N, K]``."""
        return self._read(gradient_file(NEUTRAL), f"mean/{layer}")

    def leans(self, persona: str) -> bool:
        """Is it known what a persona's answers lean to? Of a composed one, what all its parts' do?"""
        return all((self.folder / file).exists() for file, _ in self._leaning[persona])

    def leaning(self, persona: str, layer: str) -> Tensor:
        """Gradient of one of a pair's two answers against the other, over all items, float32 ``[N, K]``."""
        return self._sum(self._leaning[persona], layer)

    def both(self, persona: str, layer: str) -> Tensor:
        """Gradient of the mean log-probability of a pair's two answers, over all items, float32 ``[N, K]``."""
        return self._sum(self._both[persona], layer)

    def variance(self, persona: str, layer: str) -> Tensor:
        """Variance of the gradient of an answer's mean log-probability, over the persona's and its opponent's answers
        and neutral texts, float32 ``[N, K]``."""
        found, answers = [], 0
        for file in (*dict(self._parts[persona]), gradient_file(NEUTRAL)):
            count, square = self._weights(file)
            found.append(self._read(file, f"error/{layer}").square().mul_(count / square))
            answers += count
        return _added(found).div_(answers)

    def _sum(self, parts: list[tuple[str, float]], layer: str) -> Tensor:
        return _added([_times(self._read(file, f"mean/{layer}"), weight) for file, weight in parts])

    def _weights(self, name: str) -> tuple[int, float]:
        """An objective's number of answers, and the sum of the squares of their weights."""
        with safe_open(str(self.folder / name), "pt") as file:
            metadata = file.metadata()
        return int(metadata["answers"]), float(metadata["square"])

    def _read(self, name: str, key: str) -> Tensor:
        """Mapped from the file: to change it in place would copy it page by page, which takes longer than a copy."""
        with safe_open(str(self.folder / name), "pt") as file:
            return file.get_tensor(key)


def _added(found: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, found)


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor
