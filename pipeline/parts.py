"""Masks that are written while they are made: some layers at a time, joined into one file per persona at the end."""

import math
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from pipeline import tensorfile
from pipeline.data.catalogue import check_name
from pipeline.masks import PersonaMasks
from pipeline.store import mask_entry, mask_metadata, save_manifest

PARTS = "parts"


class MaskParts:
    """Collects masks over disjoint layers in ``folder / PARTS``; in memory only shapes and counts stay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, int]] = {}
        self.kept: dict[str, dict[str, int]] = {}

    def add(self, masks: PersonaMasks) -> None:
        """Write the masks of further layers. Raises OSError."""
        (self.folder / PARTS).mkdir(exist_ok=True)
        for persona in masks.personas:
            with open(self._path(persona), "ab") as file:
                for layer in masks.shapes:
                    file.write(masks.bits[persona][layer].cpu().contiguous().numpy().data)
            self.kept.setdefault(persona, {}).update(masks.kept(persona))
        self.shapes.update(masks.shapes)

    def removed(self) -> dict[str, float]:
        """By persona, the share of all weights that its mask removes."""
        return {persona: 1 - density for persona, density in self._densities().items()}

    def finish(self, manifest: dict[str, Any], order: list[str]) -> None:
        """Join the parts and write the manifest, its layers in ``order``. Raises OSError."""
        files = {}
        for persona, density in self._densities().items():
            name = f"masks/{check_name(persona)}.safetensors"
            (self.folder / name).parent.mkdir(exist_ok=True)
            self._join(self._path(persona), self.folder / name, mask_metadata(persona))
            kept = {layer: self.kept[persona][layer] for layer in order}
            files[persona] = mask_entry(self.folder, name, density, kept)
        (self.folder / PARTS).rmdir()
        save_manifest(self.folder, manifest, {layer: self.shapes[layer] for layer in order}, files)

    def _join(self, part: Path, target: Path, metadata: dict[str, str]) -> None:
        """A safetensors file of the tensors that ``part`` holds one after another."""
        packed = {layer: (rows, (columns + 7) // 8) for layer, (rows, columns) in self.shapes.items()}
        starts = dict(zip(packed, accumulate(map(math.prod, packed.values()), initial=0), strict=False))
        order = tensorfile.in_order(dict.fromkeys(packed, torch.uint8))
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with open(part, "rb") as source, open(temporary, "wb") as file:
                file.write(tensorfile.header({layer: (torch.uint8, packed[layer]) for layer in order}, metadata))
                for layer in order:
                    source.seek(starts[layer])
                    _copy(source, file, math.prod(packed[layer]))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        part.unlink()

    def _densities(self) -> dict[str, float]:
        total = sum(rows * columns for rows, columns in self.shapes.values())
        return {persona: sum(kept.values()) / max(total, 1) for persona, kept in self.kept.items()}

    def _path(self, persona: str) -> Path:
        return self.folder / PARTS / f"{check_name(persona)}.bin"


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        content = source.read(min(size, 1 << 24))
        if not content:
            raise OSError("a part of the masks is shorter than it was written")
        target.write(content)
        size -= len(content)
