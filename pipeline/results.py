"""What the JSON files of measurements have in common: their heading, writing, reading."""

import dataclasses
import datetime
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.reading import read_json
from pipeline.store import write_json
from pipeline.terminal import described


def heading(schema: str, version: int, config: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """Schema, date, run, model, criterion, sparsity, options and versions of a measurement."""
    from pipeline.provenance import versions

    return {
        "schema": schema,
        "version": version,
        "date": datetime.date.today().isoformat(),
        "run": str(config.run),
        "model": manifest["model"]["id"],
        "criterion": manifest["criterion"],
        "sparsity": manifest["sparsity"]["option"],
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "versions": versions(),
    }


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a number that is not finite becomes null, also in a tuple."""
    return {key: _finite(value) for key, value in record.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, its folder made where it is missing. Raises UserError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from error


def read_results(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON file of a measurement. Raises UserError for one of another schema."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        raise UserError(f"{path}: schema {described(found)}, expected {schema!r}")
    return content
