"""Masks on top of a mask: a calibration of the model as a mask of an earlier run leaves it (``--on``).

Its weights are set to zero in memory before anything is measured, so statistics, gradients and costs are those of the
pruned model. What was taken is kept: ``first-order`` may give some of it back. The new masks are masks of the whole
model as any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.masks import PersonaMasks
from pipeline.model import PersonaModel, check_layers, masked
from pipeline.sites import find_layers, matrix
from pipeline.store import MANIFEST, load_manifest, load_masks


class Base:
    """The mask below, ``masks`` of one persona, and the weights that it took from the model that it pruned."""

    def __init__(self, masks: PersonaMasks) -> None:
        self.masks = masks
        (self.persona,) = masks.personas
        self._taken: dict[str, Tensor] = {}

    def kept(self, layer: str) -> Tensor:
        """Bool ``[N, K]``, on the CPU."""
        return self.masks.mask(self.persona, layer)

    def absent(self, layer: str) -> Tensor:
        """The weights that were taken from a layer, ``[N, K]`` on the CPU; 0 where the weight is there."""
        kept, taken = self.kept(layer), self._taken[layer]
        return torch.zeros(kept.shape, dtype=taken.dtype).masked_scatter_(~kept, taken)

    def prune(self, model: Any) -> Any:
        """The model with the weights that the mask removes set to zero, in place; raises UserError for others."""
        layers = find_layers(model)
        check_layers(layers, self.masks, verify=True)
        for name in self.masks.shapes:
            weight, kept = matrix(layers[name]), self.kept(name)
            self._taken[name] = weight.detach().cpu()[~kept]
            # A product, not a choice: zeros keep their signs, and with them the layer its fingerprint.
            weight.data.mul_(kept.to(weight.device))
        return model

    @contextmanager
    def whole(self, model: Any) -> Iterator[None]:
        """All weights are in the model that was pruned, for the time of a block."""
        layers = {name: matrix(layer) for name, layer in find_layers(model).items() if name in self._taken}
        for name, weight in layers.items():
            weight.data.add_(self.absent(name).to(weight.device))
        try:
            yield
        finally:
            for name, weight in layers.items():
                weight.data.mul_(self.kept(name).to(weight.device))


def pruned(model: Any, on: str) -> tuple[Any, Base | None]:
    """The model as the mask that ``--on`` names leaves it, and that mask; as it is, and None, where it names none.

    Raises UserError.
    """
    masks = base_masks(on)
    if masks is None:
        return model, None
    base = Base(masks)
    return base.prune(model), base


@contextmanager
def under(model: Any, masks: PersonaMasks, base: Base | None) -> Iterator[PersonaModel]:
    """A plain model, which ``base`` has pruned, under the masks of one persona, for the time of a block."""
    if base is None:
        with masked(model, masks) as persona:
            yield persona
    else:
        with base.whole(model), masked(model, masks) as persona:
            yield persona


def base_masks(on: str) -> PersonaMasks | None:
    """The mask that ``--on`` names, a set of one persona; None where it names none. Raises UserError."""
    if not on:
        return None
    return load_masks(*_named(on))


def base_files(on: str) -> list[Path]:
    """The files that ``--on`` reads. Raises UserError."""
    if not on:
        return []
    folder, persona = _named(on)
    return [folder / MANIFEST, folder / load_manifest(folder)["masks"][persona]["file"]]


def _named(on: str) -> tuple[Path, str]:
    """The run's folder and the persona; a run of a single mask need not name it."""
    folder, _, persona = on.rpartition(":") if not Path(on).is_dir() else (on, "", "")
    known = list(load_manifest(Path(folder))["masks"])
    if not persona and len(known) > 1:
        raise UserError(f"--on {on}: the run has masks of {', '.join(known)}; name one, RUN:PERSONA")
    if persona and persona not in known:
        raise UserError(f"--on {on}: the run has no mask of {persona!r}; known are {', '.join(known)}")
    return Path(folder), persona or known[0]
