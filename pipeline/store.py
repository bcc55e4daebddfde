"""The on-disk format: safetensors and one JSON manifest, written atomically, verified on reading.

See docs/format.md. A run is built beside its destination (``pipeline.staging``) and its manifest is written last, so
that a folder with a manifest is always whole.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kernels.ops.activation_stats import FIELDS
from pipeline.data.catalogue import check_name
from pipeline.errors import UserError
from pipeline.masks import PersonaMasks
from pipeline.sites import Site
from pipeline.stats import ActivationStats

FORMAT = "persona-subnetworks/masks"
VERSION = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
MAX_MANIFEST = 1 << 30


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        # The library writes the metadata in an order that changes from process to process.
        header["__metadata__"] = metadata
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(memoryview(content)[8 + size :])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A failed write does not say of what.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A failed write does not say of what.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_statistics(stats: ActivationStats, path: Path, **more: str) -> None:
    """Write the statistics of every persona and site; ``more`` is further metadata."""
    header = {
        **more,
        "personas": json.dumps(stats.personas),
        "sites": json.dumps([[s.name, s.width, list(s.linears)] for s in stats.sites]),
    }
    write_tensors(path, {"counts": stats.counts, **{f"sums/{n}": t for n, t in stats.sums.items()}}, header)


def load_statistics(path: Path) -> ActivationStats:
    """Read what ``save_statistics`` wrote. Raises UserError."""
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            personas = tuple(json.loads(header["personas"]))
            sites = tuple(Site(name, width, tuple(linears)) for name, width, linears in json.loads(header["sites"]))
            sums = {site.name: file.get_tensor(f"sums/{site.name}") for site in sites}
            counts = file.get_tensor("counts")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a statistics file of this tool ({error})") from error
    for site in sites:
        if sums[site.name].shape != (len(personas), len(FIELDS), site.width):
            raise UserError(f"{path}: sums of {site.name} have shape {list(sums[site.name].shape)}")
    if counts.shape != (len(personas), 3):
        raise UserError(f"{path}: counts have shape {list(counts.shape)}, expected [{len(personas)}, 3]")
    for name, tensor in (("counts", counts), *sums.items()):
        if tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} must be finite float64, got {tensor.dtype}")
    return ActivationStats(personas, sites, sums, counts)


def save_masks(masks: PersonaMasks, folder: Path, manifest: dict[str, Any]) -> None:
    """Write one safetensors file a persona and, last, the manifest with their hashes. Raises OSError."""
    files = {}
    for persona in masks.personas:
        name = f"masks/{check_name(persona)}.safetensors"
        write_tensors(folder / name, masks.bits[persona], {"format": FORMAT, "persona": persona})
        files[persona] = {
            "file": name,
            "bytes": (folder / name).stat().st_size,
            "sha256": _sha256(folder / name),
            "density": masks.density(persona),
            "kept": masks.kept(persona),
        }
    layers = {name: list(shape) for name, shape in masks.shapes.items()}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **manifest, "layers": layers, "masks": files})


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a run. Raises UserError."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: no {MANIFEST} there, so it is not a finished run of pipeline.calibrate")
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise ValueError(f"{path.stat().st_size} bytes are no manifest")
        manifest = json.loads(path.read_bytes().decode("utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        if manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']!r}; this program reads version {VERSION}")
        for shape in manifest["layers"].values():
            if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
                raise ValueError(f"layer shape {shape}")
        _check_fields(manifest)
        for persona, entry in manifest["masks"].items():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise ValueError(f"size and checksum of persona {persona!r}")
            if entry["file"] != f"masks/{check_name(persona)}.safetensors":
                raise ValueError(f"file name {entry['file']!r} of persona {persona!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest of this tool ({type(error).__name__}: {error})") from error
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    """Raise ValueError or KeyError unless the fields that a reader relies on have their types."""
    kinds = {"model": dict, "criterion": str, "sparsity": dict, "personas": dict, "options": dict, "versions": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"field {key!r} is a {type(manifest[key]).__name__}")
    if not isinstance(manifest["model"]["id"], str) or not isinstance(manifest["sparsity"]["option"], str):
        raise ValueError("model id and sparsity option must be text")
    fingerprints = manifest["model"]["fingerprint"]
    if not isinstance(fingerprints, dict) or set(fingerprints) != set(manifest["layers"]):
        raise ValueError("the model's fingerprint does not name every layer")
    for key in ("opponents", "questions"):
        if not isinstance(manifest["personas"][key], dict):
            raise ValueError(f"personas.{key} is a {type(manifest['personas'][key]).__name__}")


def load_masks(folder: Path) -> PersonaMasks:
    """Read and verify all masks of a run. Raises UserError for truncated, altered or foreign files."""
    manifest = load_manifest(folder)
    shapes = {name: (shape[0], shape[1]) for name, shape in manifest["layers"].items()}
    bits = {
        persona: _load_persona(folder / entry["file"], entry, shapes) for persona, entry in manifest["masks"].items()
    }
    return PersonaMasks(shapes, bits, manifest)


def _load_persona(path: Path, entry: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if size != entry["bytes"]:
        raise UserError(f"{path}: {size} bytes, the manifest says {entry['bytes']}; the file is truncated or altered")
    if not path.is_file() or _sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: the checksum differs from the manifest's; the file is altered")
    expected = sum(rows * math.ceil(columns / 8) for rows, columns in shapes.values())
    if size < expected:
        raise UserError(f"{path}: {size} bytes cannot hold {expected} bytes of masks")
    try:
        with safe_open(str(path), "pt") as file:
            if set(file.keys()) != set(shapes):
                raise ValueError(f"layers differ from the manifest's: {sorted(set(file.keys()) ^ set(shapes))[:3]}")
            bits = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    for name, (rows, columns) in shapes.items():
        if bits[name].dtype != torch.uint8 or tuple(bits[name].shape) != (rows, math.ceil(columns / 8)):
            raise UserError(
                f"{path}: mask of {name} is {list(bits[name].shape)} {bits[name].dtype}, layer is [{rows}, {columns}]"
            )
    return bits


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
