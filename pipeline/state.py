"""What an unfinished run was started with, so that it goes on with the same or not at all."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue
from pipeline.data.module import draw
from pipeline.errors import UserError
from pipeline.fingerprint import data_hash
from pipeline.loading import resolve
from pipeline.provenance import PLACE, versions
from pipeline.reading import read_json
from pipeline.stacking import base_files
from pipeline.staging import STATE, staging_of
from pipeline.store import MANIFEST, load_manifest, write_json

BUILDING = (
    "criterion",
    "sparsity",
    "max_perplexity_increase",
    "activation",
    "temperature",
    "pool",
    "evidence",
    "shift",
)
"""Options that only scoring and selection read: they may change, what is measured stays as it is."""
BLOCKS, BLOCK = 64, 1 << 16
"""A file is recognised by so many blocks of so many bytes, evenly spread: a whole 70B model would take minutes."""


def options_of(config: CalibrateConfig) -> dict[str, Any]:
    """Every option that a result depends on, or that says where it went, as JSON can hold it."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    del options["resume"]
    return options


def saved_options(output: Path) -> dict[str, Any]:
    """The options that the unfinished (or just finished) run of ``output`` was started with. Raises UserError."""
    staging = staging_of(output)
    for folder in (staging, output):
        if (folder / STATE).exists():
            return _read(folder)["options"]
    if (output / MANIFEST).exists():
        return load_manifest(output)["options"]
    raise UserError(f"--resume {output}: there is no unfinished run (looked for {staging / STATE})")


def begin(staging: Path, config: CalibrateConfig, catalogue: Catalogue) -> None:
    """Write down what the run starts with."""
    write_json(staging / STATE, _described(config, catalogue))


def check(staging: Path, config: CalibrateConfig, catalogue: Catalogue) -> dict[str, Any]:
    """Check that an unfinished run can go on. Returns the options of ``BUILDING`` that differ, as they were.

    Raises UserError with every other difference.
    """
    then, now = _read(staging), _described(config, catalogue)
    differing = [
        f"--{name.replace('_', '-')} ({then['options'].get(name)}, now {value})"
        for name, value in now["options"].items()
        if name not in (*BUILDING, *PLACE) and then["options"].get(name) != value
    ]
    for plus in then["data"] | now["data"]:
        if then["data"].get(plus) != now["data"].get(plus):
            differing.append(f"the items of {plus}")
    for name in then["versions"] | now["versions"]:
        if then["versions"].get(name) != now["versions"].get(name):
            differing.append(f"{name} {then['versions'].get(name)}, now {now['versions'].get(name)}")
    differing += changes(then["files"], now["files"])
    if differing:
        raise UserError(
            f"--resume {config.output}: the run was started with something else: {'; '.join(differing)}; put it back, "
            f"or begin anew with --overwrite"
        )
    return {n: then["options"].get(n) for n in BUILDING if then["options"].get(n) != now["options"][n]}


def check_files(staging: Path) -> None:
    """Raise UserError if a model or data file is another than at the start; a folder without a state has no start."""
    if not (staging / STATE).exists():
        return
    then = _read(staging)["files"]
    if changed := changes(then, {name: _file(Path(name)) for name in then}):
        raise UserError(f"changed during the run: {'; '.join(changed)}; put it back and go on with --resume")


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two descriptions of files, one sentence each."""
    found = []
    for name in then | now:
        old, new = then.get(name), now.get(name)
        if new is None or old is None:
            found.append(f"{name} is {'gone' if new is None else 'new'}")
        elif old["bytes"] != new["bytes"]:
            found.append(f"{name} had {old['bytes']} bytes, now {new['bytes']}")
        elif old["blocks"] != new["blocks"]:
            found.append(f"{name} has another content")
        elif old["bytes"] > BLOCKS * BLOCK and old["written"] != new["written"]:
            found.append(f"{name} was written again")
    return found


def _described(config: CalibrateConfig, catalogue: Catalogue) -> dict[str, Any]:
    drawn = {s.plus: draw(s.split("calibration"), config.samples, config.seed) for s in catalogue.sets}
    sources = [Path(s.source.partition(":")[2] or s.source).expanduser() for s in catalogue.sets]
    model = Path(resolve(config.model)).expanduser()
    files = [file for file in dict.fromkeys([*sources, *base_files(config.on)]) if file.is_file()]
    files += sorted(file for file in model.iterdir() if file.is_file()) if model.is_dir() else []
    return {
        "options": options_of(config),
        "data": {plus: data_hash(items) for plus, items in drawn.items()},
        "files": {str(file.absolute()): _file(file) for file in files},
        "versions": versions(),
    }


def _file(path: Path) -> dict[str, Any] | None:
    """Size, time of the last change, and a hash: of the whole file, or of ``BLOCKS`` blocks of a large one."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.sha256()
            if status.st_size <= BLOCKS * BLOCK:
                digest.update(file.read())
            else:
                for number in range(BLOCKS):
                    file.seek((status.st_size - BLOCK) * number // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return {"bytes": status.st_size, "written": status.st_mtime_ns, "blocks": digest.hexdigest()}


def _read(staging: Path) -> dict[str, Any]:
    try:
        state = read_json(staging / STATE)
        if not all(isinstance(state[key], dict) for key in ("options", "data", "files", "versions")):
            raise ValueError("a field is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{staging / STATE}: cannot be read ({error}); begin anew with --overwrite") from error
    return state
