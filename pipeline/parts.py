"""Masks that are written while they are made: some layers at a time, joined into one file per persona at the end."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.building import LayerMask
from pipeline.data.catalogue import check_name
from pipeline.encoding import bytes_of
from pipeline.masks import count_kept, density
from pipeline.store import save_manifest, write_mask

PARTS = "parts"


class MaskParts:
    """Collects masks over disjoint layers in ``folder / PARTS``; in memory only shapes and counts stay.

    ``kept``: by persona and layer, the number of weights kept; ``shared``: by persona, how many of them its opponent
    keeps too, where that was asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, int]] = {}
        self.kept: dict[str, dict[str, int]] = {}
        self.shared: dict[str, int] = {}

    def add(self, one: LayerMask) -> None:
        """Write a further layer's mask; all personas get their layers in the same order. Raises OSError."""
        (self.folder / PARTS).mkdir(exist_ok=True)
        with open(self._path(one.persona), "ab") as file:
            file.write(one.bits.cpu().contiguous().numpy().data)
        self.shapes[one.layer] = one.shape
        self.kept.setdefault(one.persona, {})[one.layer] = count_kept(one.bits)
        if one.shared is not None:
            self.shared[one.persona] = self.shared.get(one.persona, 0) + one.shared

    def removed(self) -> dict[str, float]:
        """By persona, the share of all weights that its mask removes."""
        return {persona: 1 - density(kept.values(), self.shapes) for persona, kept in self.kept.items()}

    def finish(self, manifest: dict[str, Any], order: list[str]) -> None:
        """Join the parts and write the manifest, its layers in ``order``. Raises OSError."""
        sizes = [rows * bytes_of(columns) for rows, columns in self.shapes.values()]
        starts = dict(zip(self.shapes, accumulate(sizes, initial=0), strict=False))
        shapes, files = {layer: self.shapes[layer] for layer in order}, {}
        for persona in self.kept:
            with open(self._path(persona), "rb") as file:

                def read(layer: str, file: Any = file) -> Tensor:
                    rows, columns = self.shapes[layer]
                    file.seek(starts[layer])
                    bits = torch.empty(rows, bytes_of(columns), dtype=torch.uint8)
                    if file.readinto(bits.numpy().data) < bits.nbytes:
                        raise OSError("a part of the masks is shorter than it was written")
                    return bits

                files[persona] = write_mask(self.folder, persona, shapes, read)
            self._path(persona).unlink()
        (self.folder / PARTS).rmdir()
        save_manifest(self.folder, manifest, shapes, files)

    def _path(self, persona: str) -> Path:
        return self.folder / PARTS / f"{check_name(persona)}.bin"
