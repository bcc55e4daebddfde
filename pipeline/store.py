"""The on-disk format: safetensors and one JSON manifest, written atomically, verified on reading.

See docs/format.md. A run is built beside its destination (``pipeline.staging``) and its manifest is written last, so
that a folder with a manifest is always whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.ops.activation_stats import FIELDS
from pipeline import tensorfile
from pipeline.atomic import replacing
from pipeline.data.catalogue import check_name
from pipeline.data.forms import NEUTRAL
from pipeline.encoding import bytes_of, check_stored, decode, encode, least_bytes, stored_as
from pipeline.errors import UserError
from pipeline.masks import PersonaMasks, count_kept, density
from pipeline.reading import parse_json, read_json
from pipeline.sites import Site
from pipeline.stats import ActivationStats
from pipeline.terminal import described, printable, shortened

FORMAT = "persona-subnetworks/masks"
VERSION = 2
READ = (1, 2)
"""Versions that are read; 1 has no lists (``pipeline.encoding``)."""
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
MOST_COLUMNS = 1 << 31
"""Rows or columns of a layer that a manifest may name."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it. Raises OSError."""
    with replacing(path) as file:
        tensorfile.write(file, tensors, metadata)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name and rename it. Raises OSError."""
    with replacing(path) as file:
        for part in json.JSONEncoder(indent=1, ensure_ascii=False, allow_nan=False).iterencode(content):
            file.write(part.encode("utf-8"))
        file.write(b"\n")


def save_statistics(
    stats: ActivationStats, path: Path, beside: Mapping[str, Tensor] | None = None, **more: str
) -> None:
    """Write the statistics of every persona and site; further tensors ``beside`` them and ``more`` metadata."""
    header = {
        **more,
        "personas": json.dumps(stats.personas),
        "sites": json.dumps([[s.name, s.width, list(s.linears)] for s in stats.sites]),
    }
    write_tensors(path, {**stats.tensors, **(beside or {})}, header)


def load_statistics(path: Path) -> ActivationStats:
    """Read what ``save_statistics`` wrote. Raises UserError."""
    try:
        with safe_open(str(path), "pt") as file:
            personas, sites = _statistics_header(file.metadata() or {}, set(file.keys()))
            for site in sites:
                shape = [len(personas), len(FIELDS), site.width]
                _check_tensor(file, f"sums/{site.name}", "F64", shape)
                if site.routed:
                    _check_tensor(file, f"counts/{site.name}", "F64", [len(personas), 3])
            _check_tensor(file, "counts", "F64", [len(personas), 3])
            sums = {site.name: file.get_tensor(f"sums/{site.name}") for site in sites}
            routed = {site.name: file.get_tensor(f"counts/{site.name}") for site in sites if site.routed}
            counts = file.get_tensor("counts")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}: not a statistics file of this tool ({shortened(str(error))})") from error
    stats = ActivationStats(personas, sites, sums, counts, routed)
    for name, tensor in stats.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} holds NaN or infinity")
    if any(bool((held < 0).any()) for held in (counts, *routed.values())):
        raise UserError(f"{path}: counts below 0")
    return stats


def _statistics_header(header: dict[str, str], held: set[str]) -> tuple[tuple[str, ...], tuple[Site, ...]]:
    """Personas and sites; ``held`` are the names of the file's tensors. Raises KeyError, TypeError or ValueError."""
    personas = tuple(check_name(p) if p != NEUTRAL else p for p in parse_json(header["personas"].encode()))
    sites = tuple(
        Site(name, width, tuple(linears), f"counts/{name}" in held)
        for name, width, linears in parse_json(header["sites"].encode())
    )
    for site in sites:
        if not all(isinstance(name, str) for name in (site.name, *site.linears)) or type(site.width) is not int:
            raise ValueError(f"site {site.name!r:.80}")
    if len(set(personas)) < len(personas) or len({site.name for site in sites}) < len(sites):
        raise ValueError("a persona or a site is named twice")
    return personas, sites


def save_masks(masks: PersonaMasks, folder: Path, manifest: dict[str, Any]) -> None:
    """Write one safetensors file a persona and, last, the manifest with their hashes. Raises OSError."""
    files = {
        persona: write_mask(folder, persona, masks.shapes, masks.bits[persona].__getitem__) for persona in masks.bits
    }
    save_manifest(folder, manifest, masks.shapes, files)


def write_mask(
    folder: Path, persona: str, shapes: Mapping[str, tuple[int, int]], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Write a persona's mask file and return the manifest's entry for it. Raises OSError.

    ``read(layer)`` gives packed bits, uint8 ``[N, ceil(K / 8)]``. It is called twice for each layer of ``shapes``, for
    the header has to say how every layer is stored; one layer is held at a time.
    """
    name = f"masks/{check_name(persona)}.safetensors"
    kept = {layer: count_kept(read(layer)) for layer in shapes}
    stored = {layer: stored_as(*shape, math.prod(shape) - kept[layer]) for layer, shape in shapes.items()}
    order = tensorfile.in_order({layer: dtype for layer, (dtype, _) in stored.items()})
    tensors = ((layer, encode(read(layer), shapes[layer][1])) for layer in order)
    with replacing(folder / name) as file:
        metadata = {"format": FORMAT, "persona": persona}
        tensorfile.write_each(file, {layer: stored[layer] for layer in order}, tensors, metadata)
    return {"file": name, **_signed(folder / name), "density": density(kept.values(), shapes), "kept": kept}


def save_manifest(
    folder: Path, manifest: dict[str, Any], shapes: dict[str, tuple[int, int]], files: dict[str, dict[str, Any]]
) -> None:
    """Write the manifest over masks that are written already. Raises OSError."""
    layers = {name: list(shape) for name, shape in shapes.items()}
    other = {"files": {STATISTICS: _signed(folder / STATISTICS)}} if (folder / STATISTICS).exists() else {}
    content = {"format": FORMAT, "version": VERSION, **manifest, "layers": layers, "masks": files, **other}
    write_json(folder / MANIFEST, content)


def _signed(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a run. Raises UserError."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: no {MANIFEST} there, so it is not a finished run of pipeline.calibrate")
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {described(manifest['format'])}")
        if type(manifest["version"]) is not int or manifest["version"] not in READ:
            raise ValueError(f"version {described(manifest['version'])}; this program reads versions 1 and 2")
        for shape in manifest["layers"].values():
            if len(shape) != 2 or not all(type(size) is int and 0 < size < MOST_COLUMNS for size in shape):
                raise ValueError(f"layer shape {described(shape)}")
        _check_fields(manifest)
        for persona, entry in manifest["masks"].items():
            _check_signature(entry, persona)
            if entry["file"] != f"masks/{check_name(persona)}.safetensors":
                raise ValueError(f"file name {described(entry['file'])} of persona {persona!r}")
        for name, entry in manifest.get("files", {}).items():
            if name != STATISTICS:
                raise ValueError(f"file name {described(name)}")
            _check_signature(entry, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            shortened(f"{path}: not a manifest of this tool ({type(error).__name__}: {shortened(str(error))})", 2000)
        ) from error
    return manifest


def _check_signature(entry: dict[str, Any], name: str) -> None:
    if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
        raise ValueError(f"size and checksum of {name!r}")


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
    for names in manifest["personas"]["opponents"].items():
        for name in names:
            check_name(name)
    shown = (manifest["model"]["id"], manifest["criterion"], manifest["sparsity"]["option"], *manifest["layers"])
    for text in shown:
        if printable(text) != text:
            raise ValueError(f"control characters in {text[:80]!r}")


def load_masks(folder: Path, only: str | None = None) -> PersonaMasks:
    """Read and verify all masks of a run, or that of ``only`` one persona.

    Raises UserError for truncated, altered or foreign files.
    """
    manifest = load_manifest(folder)
    shapes = {name: (shape[0], shape[1]) for name, shape in manifest["layers"].items()}
    chosen = [persona for persona in manifest["masks"] if only in (None, persona)]
    _check_memory(folder, len(chosen) * sum(rows * bytes_of(columns) for rows, columns in shapes.values()))
    bits = {
        persona: _load_persona(
            folder / manifest["masks"][persona]["file"], manifest["masks"][persona], shapes, manifest["version"] > 1
        )
        for persona in chosen
    }
    return PersonaMasks(shapes, bits, manifest)


def _check_memory(folder: Path, needed: int) -> None:
    """Raise UserError for masks that this machine cannot hold: lists in small files may stand for any size."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(f"{folder}: the masks take {needed} bytes, this machine has {there} bytes of memory")


def _load_persona(
    path: Path, entry: dict[str, Any], shapes: dict[str, tuple[int, int]], lists: bool
) -> dict[str, Tensor]:
    """Packed bits by layer; ``lists``: some layers may be stored as lists."""
    size = check_file(path, entry)
    expected = sum(least_bytes(*shape) if lists else shape[0] * bytes_of(shape[1]) for shape in shapes.values())
    if size < expected:
        raise UserError(f"{path}: {size} bytes cannot hold {expected} bytes of masks")
    try:
        with safe_open(str(path), "pt") as file:
            if set(file.keys()) != set(shapes):
                raise ValueError(f"layers differ from the manifest's: {sorted(set(file.keys()) ^ set(shapes))[:3]}")
            for name, shape in shapes.items():
                found = file.get_slice(name)
                check_stored(name, found.get_dtype(), found.get_shape(), shape, lists)
            return {name: decode(name, file.get_tensor(name), shape) for name, shape in shapes.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def check_file(path: Path, entry: dict[str, Any]) -> int:
    """The size of a file that is as the manifest's ``entry`` says. Raises UserError."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(
                f"{path}: {size} bytes, the manifest says {entry['bytes']}; the file is truncated or altered"
            )
        if not path.is_file() or _sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: the checksum differs from the manifest's; the file is altered")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return size


def _check_tensor(file: Any, name: str, dtype: str, shape: list[int]) -> None:
    """Raise ValueError unless a tensor in an open safetensors file is as it should be; reads the header alone."""
    found = file.get_slice(name)
    if found.get_dtype() != dtype or found.get_shape() != shape:
        raise ValueError(f"tensor {name} is {found.get_shape()} {found.get_dtype()}, expected {shape} {dtype}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
