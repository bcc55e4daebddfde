"""What a run's folder holds for a report: manifest, evaluations, role play, questionnaire."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.choosing import RoleRecord
from pipeline.errors import UserError
from pipeline.evaluation import SCHEMA, Contrast, Record, place
from pipeline.figures import Point
from pipeline.mbti import Lean, Signs, Summary
from pipeline.questionnaire import SCHEMA as QUESTIONNAIRE
from pipeline.reading import read_json
from pipeline.results import read_results
from pipeline.roleplay import SCHEMA as ROLEPLAY
from pipeline.store import MANIFEST, load_manifest
from pipeline.tables import by_pair
from pipeline.terminal import described

R = TypeVar("R")
BYTES = ("memory_bytes", "working_bytes", "disk_bytes")
KEYS = ("condition", "persona", "pair", "form", "n")
"""What a record must say; numbers may be missing (null) where they are not finite."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's JSON: the file, its whole content, records and contrasts."""

    path: Path
    content: dict[str, Any]
    records: list[Record]
    contrasts: list[Contrast]

    @property
    def label(self) -> str:
        return f"{self.content['criterion']}, {self.content['sparsity']}"


@dataclass
class Gathered:
    """Everything that a report is made from. ``also`` are evaluations of other runs, for the curves only."""

    run: Path
    manifest: dict[str, Any]
    evaluations: list[Evaluation] = field(default_factory=list)
    also: list[Evaluation] = field(default_factory=list)
    roleplay: dict[str, Any] | None = None
    role_records: list[RoleRecord] = field(default_factory=list)
    questionnaire: dict[str, Any] | None = None
    leans: list[Lean] = field(default_factory=list)
    signs: list[Signs] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def gather(run: Path, evaluations: Sequence[Path], also: Sequence[Path]) -> Gathered:
    """Read a run's folder; ``evaluations`` and ``also`` are files, or folders that are searched.

    Without ``evaluations`` the run's folder is searched. Raises UserError for what is not of this program.
    """
    found = Gathered(run, load_manifest(run))
    by_schema = _by_schema(run)
    chosen = [file for path in evaluations for file in _evaluation_files(path)] or by_schema.get(SCHEMA, [])
    found.evaluations = [read_evaluation(file) for file in chosen]
    found.also = [read_evaluation(file) for path in also for file in _evaluation_files(path)]
    found.files = [run / MANIFEST, *chosen, *(one.path for one in found.also)]
    if files := by_schema.get(ROLEPLAY):
        found.roleplay = read_results(files[-1], ROLEPLAY)
        found.role_records = _built(RoleRecord, found.roleplay.get("records"), files[-1], ("condition", "n"))
        found.files.append(files[-1])
    if files := by_schema.get(QUESTIONNAIRE):
        asked = found.questionnaire = read_results(files[-1], QUESTIONNAIRE)
        found.leans = _built(Lean, asked.get("records"), files[-1], ("form", "dichotomy", "n"))
        found.signs = _built(Signs, asked.get("signs"), files[-1], ("form", "spelled"))
        found.summaries = _built(Summary, asked.get("summary"), files[-1], ("form", "types"))
        found.files.append(files[-1])
    return found


def _by_schema(folder: Path) -> dict[str, list[Path]]:
    """The JSON files of a folder by what they say they are; files that say nothing are passed over."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as JSON ({error})") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if isinstance(schema, str):
            found.setdefault(schema, []).append(file)
    return found


def _evaluation_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = _by_schema(path).get(SCHEMA, [])
    if not found:
        raise UserError(f"{path}: no evaluation in this folder; write one with pipeline.evaluate --json")
    return found


def read_evaluation(path: Path) -> Evaluation:
    """Read the JSON of pipeline.evaluate. Raises UserError."""
    content = read_results(path, SCHEMA)
    for key in ("criterion", "sparsity", "model", "date"):
        if not isinstance(content.get(key), str):
            raise UserError(f"{path}: field {key!r} is no text")
    if not isinstance(content.get("options", {}), dict):
        raise UserError(f"{path}: field 'options' is no object")
    numbers = ("prompt_tokens", "first_token_seconds", "tokens_per_second", *BYTES)
    words: dict[str, Any] = {"condition": str, "task": str, "metric": str, "value": int | float}
    _check_entries(content, "abilities", path, words)
    _check_entries(content, "efficiency", path, {"condition": str} | dict.fromkeys(numbers, int | float))
    _check_entries(content, "answers", path, {"question": str, "answer": str})
    _check_entries(content, "generation", path, {"pair": str, "condition": str, "answers": list})
    for entry in content.get("generation", []):
        kinds = {"question": str, "answer": str, "tokens": int, "repetition": int | float}
        _check_entries(entry, "answers", path, kinds)
    records = _built(Record, content.get("records"), path, KEYS)
    contrasts = _built(Contrast, content.get("contrasts"), path, ("pair", "condition", "form"))
    try:
        for record in records:
            place(record.condition)
    except ValueError as error:
        raise UserError(f"{path}: unknown condition {described(record.condition)}") from error
    return Evaluation(path, content, records, contrasts)


def _built(kind: type[R], entries: Any, path: Path, needed: Sequence[str]) -> list[R]:
    """Dataclasses from JSON objects; fields that a later version added are passed over.

    A number that is null (it was not finite) or missing (an earlier version) is NaN. Raises UserError.
    """
    if not isinstance(entries, list):
        raise UserError(f"{path}: no list of {kind.__name__}s")
    built = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or any(entry.get(name) is None for name in needed):
            raise UserError(f"{path}: entry {number} of its {kind.__name__}s lacks one of {', '.join(needed)}")
        values = {}
        for one in dataclasses.fields(kind):  # type: ignore[arg-type]
            value = entry.get(one.name)
            wanted = (int, float) if one.type in (int, float) else (str,) if one.type is str else (object,)
            if value is not None and not isinstance(value, wanted):
                raise UserError(f"{path}: entry {number} of its {kind.__name__}s: {one.name} is {described(value)}")
            values[one.name] = math.nan if value is None and one.type is float else value
        built.append(kind(**values))
    return built


def _check_entries(content: dict[str, Any], name: str, path: Path, kinds: Mapping[str, Any]) -> None:
    """Raise UserError unless a field is missing or a list of objects with members of these kinds."""
    entries = content.get(name, [])
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        for key, kind in kinds.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise UserError(f"{path}: entry {number} of {name}: {key!r} is missing or of another kind")


def points_of(evaluation: Evaluation) -> list[Point]:
    """One point a condition: with its interval for one pair, the mean over pairs for several.

    Of two forms of a pair, the first (free) counts.
    """
    found: dict[str, list[Point]] = {}
    seen: set[str] = set()
    for (pair, form), group in by_pair(evaluation.records).items():
        if pair in seen or form == "options":
            continue
        seen.add(pair)
        costs: dict[str, list[float]] = {}
        for record in group:
            costs.setdefault(record.condition, []).append(record.perplexity)
        base = min(costs.get("unmasked", [math.nan]))
        for c in evaluation.contrasts:
            if (c.pair, c.form) == (pair, form) and c.condition in costs and c.condition != "opponent mask":
                ratio = sum(costs[c.condition]) / len(costs[c.condition]) / base
                interval = c.separation, c.separation_low, c.separation_high
                point = Point(
                    str(evaluation.path), evaluation.content["criterion"], c.condition, pair, *interval, ratio
                )
                found.setdefault(c.condition, []).append(point)
    return [_mean(points) for points in found.values()]


def _mean(points: Sequence[Point]) -> Point:
    if len(points) == 1:
        return points[0]
    separation, ratio = (sum(getattr(p, name) for p in points) / len(points) for name in ("separation", "ratio"))
    first = points[0]
    return Point(first.source, first.criterion, first.condition, "", separation, None, None, ratio)
