"""Masks on top of a mask: a calibration of the model as a mask of an earlier run leaves it (``--on``).

Its weights are set to zero in memory before anything is measured, so statistics, gradients and costs are those of the
pruned model. The new masks remove what the one below them removes, and are masks of the whole model as any other.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.masks import PersonaMasks
from pipeline.model import check_layers
from pipeline.sites import find_layers, matrix
from pipeline.store import MANIFEST, load_manifest, load_masks


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


def pruned(model: Any, base: PersonaMasks | None) -> Any:
    """The model with the weights that ``base`` removes set to zero, in place. Raises UserError for other weights."""
    if base is None:
        return model
    layers = find_layers(model)
    check_layers(layers, base, verify=True)
    (persona,) = base.personas
    for name in base.shapes:
        weight = matrix(layers[name])
        # A product, not a choice: zeros keep their signs, and with them the layer its fingerprint.
        weight.data.mul_(base.mask(persona, name).to(weight.device))
    return model
