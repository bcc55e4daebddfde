"""The items that a run was calibrated on, read again from where its manifest says they came from."""

from typing import Any

from pipeline.data.catalogue import Catalogue, load_catalogue
from pipeline.data.forms import Item
from pipeline.data.module import draw
from pipeline.errors import UserError
from pipeline.fingerprint import data_hash


def calibration_items(manifest: dict[str, Any], persona: str) -> list[Item]:
    """The items that ``persona`` was calibrated on, from its side: ``matching`` is its own answer.

    A composed persona (a type, a mixture) has the items of all its parts. Raises UserError if a source can no longer
    be read, or holds other items than the run was calibrated on.
    """
    catalogue = _catalogue(manifest)
    parts = {c.name: [pole for pole, _ in c.parts] for c in catalogue.compositions}.get(persona, [persona])
    return [item for pole in parts for item in _of_pole(manifest, catalogue, pole)]


def _catalogue(manifest: dict[str, Any]) -> Catalogue:
    options = manifest["options"]
    try:
        return load_catalogue(options["personas"], compose=options["compose"])
    except UserError as error:
        raise UserError(
            f"the run's calibration items ({options['personas']}) cannot be read any more: {error}"
        ) from error


def _of_pole(manifest: dict[str, Any], catalogue: Catalogue, pole: str) -> list[Item]:
    options, hashes = manifest["options"], manifest["personas"]["data_sha256"]
    (personas,) = (s for s in catalogue.sets if pole in s.poles)
    items = draw(personas.split("calibration"), options["samples"], options["seed"])
    if hashes[personas.plus] != data_hash(items):
        raise UserError(f"{personas.source}: no longer the items that {pole!r} was calibrated on; restore the file")
    return items if pole == personas.plus else [item.swapped() for item in items]
