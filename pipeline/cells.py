"""The cells of a study: one calibration and one evaluation each, as the command lines make them."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import note
from pipeline.errors import UserError
from pipeline.options import StudyConfig
from pipeline.staging import STATE, is_finished, staging_of


@dataclass(frozen=True)
class Cell:
    """A pair of personas, a seed and the values of what is varied; everything of it lies in ``folder``."""

    name: str
    sources: str
    held_out: str
    seed: int
    values: tuple[tuple[str, str], ...]
    folder: Path

    @property
    def run(self) -> Path:
        """Where its masks are written."""
        return self.folder / "run"

    @property
    def evaluation(self) -> Path:
        """What was measured; written last."""
        return self.folder / "evaluation.json"

    @property
    def others(self) -> Path:
        """What was measured under the masks of other sets."""
        return self.folder / "others.json"

    @property
    def label(self) -> str:
        """The varied values, "sparsity=0.02"; "" if nothing is varied."""
        return ", ".join(f"{name}={value}" for name, value in self.values)


def cells_of(config: StudyConfig) -> list[Cell]:
    """All cells, seed by seed, so that a study that is stopped early has every set once. Raises UserError."""
    named = [(_name(sources), sources, held_out) for sources, held_out in config.pairs]
    if twice := [name for name, count in Counter(name for name, _, _ in named).items() if count > 1]:
        raise UserError(f"--sets: {twice[0]} is named twice; name the personas before the file, PLUS/MINUS=FILE")
    cells = []
    for seed in config.numbers:
        for values in config.grid():
            for name, sources, held_out in named:
                given = "".join(f",{_safe(option)}={_safe(value)}" for option, value in values.items())
                folder = config.output / "cells" / f"{name},seed={seed}{given}"
                cells.append(Cell(name, sources, held_out, seed, tuple(values.items()), folder))
    return cells


def _name(sources: str) -> str:
    """What a set is called: its personas where they are named, else the source without its folders."""
    named, equals, _ = sources.partition("=")
    return _safe(named if equals else Path(sources).stem)


def _safe(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def make(cell: Cell, calibrate: list[str], evaluate: list[str], *, keep_masks: bool) -> None:
    """Do what is left of a cell, in processes of their own, so that memory is free again behind each.

    Raises UserError if one of them fails; its own message stands above.
    """
    if cell.evaluation.exists():
        return
    cell.folder.mkdir(parents=True, exist_ok=True)
    if not is_finished(cell.run):
        varied = [word for name, value in cell.values for word in (f"--{name}", value)]
        # A process that was killed before it wrote its state left nothing to go on with.
        begun = (staging_of(cell.run) / STATE).exists()
        fresh = ["--personas", cell.sources, "--seed", str(cell.seed), "--output", str(cell.run), *varied, *calibrate]
        _call(cell, "calibrate", ["--resume", str(cell.run)] if begun else fresh)
    data = ["--data", cell.held_out] if cell.held_out else []
    _call(cell, "evaluate", [str(cell.run), *data, *evaluate, "--json", str(cell.evaluation)])
    if not keep_masks:
        shutil.rmtree(cell.run)


def cross(cells: Sequence[Cell], evaluate: list[str]) -> None:
    """Measure every cell's items under the masks of the other sets, of the same seed and values; what is there is kept,
    unless a set has come since.

    Raises UserError as ``make`` does.
    """
    for number, cell in enumerate(cells, 1):
        runs = [str(o.run) for o in cells if (o.seed, o.values) == (cell.seed, cell.values) and o is not cell]
        if set(runs) <= _known(cell):
            continue
        note(f"other masks, cell {number} of {len(cells)}")
        data = ["--data", cell.held_out] if cell.held_out else []
        only = ["--conditions", "others", "--other-runs", json.dumps(runs), "--generate", "0", "--questions", "0"]
        only += ["--no-efficiency", "--tasks", ""]
        files = ["--plot", str(cell.folder / "others.png"), "--json", str(cell.others)]
        _call(cell, "evaluate", [str(cell.run), *data, *evaluate, *only, *files], cell.others.stem)


def _known(cell: Cell) -> set[str]:
    """The other runs under whose masks a cell's items were measured."""
    from pipeline.gathered import read_evaluation

    if not cell.others.exists():
        return set()
    return set(read_evaluation(cell.others).content.get("options", {}).get("other_runs", []))


def _call(cell: Cell, command: str, options: list[str], name: str = "") -> None:
    note(f"{cell.folder.name}: pipeline.{command} {' '.join(options)}")
    with open(cell.folder / f"{name or command}.txt", "w", encoding="utf-8") as output:
        code = subprocess.run([sys.executable, "-m", f"pipeline.{command}", *options], stdout=output).returncode
    if code in (-2, 130):
        raise KeyboardInterrupt
    if code:
        raise UserError(
            f"{cell.folder.name}: pipeline.{command} ended with code {code}; what it said stands above. Once that is "
            f"mended, the same command goes on"
        )
