"""Options of the commands that look at a finished run. The docstring under a field is its help text."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.data.catalogue import DICHOTOMIES
from pipeline.errors import UserError

ROLEPLAY_CONDITIONS = ("prompt", "rag", "mask", "prompt+mask", "random")


def evaluation_options(config: Any) -> EvaluateConfig:
    """The options that ``config`` shares with an evaluation, checked as there. Raises UserError."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(EvaluateConfig) if hasattr(config, f.name)}
    return EvaluateConfig(**{name: value for name, value in shared.items() if name not in ("json", "plot")})


@dataclass
class RoleplayConfig:
    """Which characters to ask, and how."""

    run: Path
    """Folder that pipeline.calibrate wrote."""
    data: str = ""
    """Items with several lines to choose from: characters, voices:FILE or roleagentbench:FOLDER; default what the run
    was calibrated on. Items whose question was calibrated on are left out."""
    samples: int = 0
    """At most so many items, drawn with the seed; 0 takes all."""
    conditions: str = "prompt,mask,random"
    """What to compare with the unmasked model, comma-separated: prompt (a persona prompt), rag (the nearest calibration
    items as earlier turns of the chat), mask, prompt+mask (both at once), random (random masks)."""
    shots: int = 3
    """rag: how many calibration items stand before a question."""
    draws: int = 1
    """Random masks for each character."""
    model: str = ""
    """Model to load instead of the one in the manifest (it must have the same weights)."""
    precision: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto."""
    gamma: float = 0.0
    """Soft gate: share of a removed weight that stays, in [0, 1) (eq. 7)."""
    max_length: int = 1024
    """Longest sequence in tokens."""
    batch_tokens: int = 2048
    """Tokens of a padded batch; one in which answers are written has four times as many."""
    texts: int = 0
    """Perplexity on the first so many of the 40 neutral texts; 0 takes all."""
    bootstrap: int = 2000
    """Resamples for the 95 % intervals."""
    json: Path | None = None
    """Write the records here (schema in docs/roleplay.md); default RUN/roleplay.json."""
    seed: int = 0
    """Seed of draws, bootstrap and random masks."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)
        self.json = Path(self.json) if self.json else self.run / "roleplay.json"
        options = evaluation_options(self)
        if unknown := [name for name in options.wanted if name not in ROLEPLAY_CONDITIONS]:
            raise UserError(f"--conditions: unknown {unknown[0]!r}; known are {', '.join(ROLEPLAY_CONDITIONS)}")


@dataclass
class QuestionnaireConfig:
    """Which run to ask, and how."""

    run: Path
    """Folder that pipeline.calibrate wrote, with masks of types (--personas types) or poles (dichotomies)."""
    samples: int = 0
    """At most so many items per dichotomy, drawn with the seed; 0 takes all eight."""
    model: str = ""
    """Model to load instead of the one in the manifest (it must have the same weights)."""
    precision: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto."""
    gamma: float = 0.0
    """Soft gate: share of a removed weight that stays, in [0, 1) (eq. 7)."""
    max_length: int = 1024
    """Longest sequence in tokens."""
    batch_tokens: int = 2048
    """Tokens of a padded batch."""
    bootstrap: int = 2000
    """Resamples for the 95 % intervals."""
    json: Path | None = None
    """Write the records here (schema in docs/questionnaire.md); default RUN/questionnaire.json."""
    radar: Path | None = None
    """PNG of the radar plot; default RUN/questionnaire-radar.png."""
    heat_map: Path | None = None
    """PNG of the heat map; default RUN/questionnaire-heat.png."""
    seed: int = 0
    """Seed of the draw and the bootstrap."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)
        self.json = Path(self.json) if self.json else self.run / "questionnaire.json"
        self.radar = Path(self.radar) if self.radar else self.run / "questionnaire-radar.png"
        self.heat_map = Path(self.heat_map) if self.heat_map else self.run / "questionnaire-heat.png"
        evaluation_options(self)


@dataclass
class ReportConfig:
    """What to report on, and where to."""

    run: Path
    """Folder that pipeline.calibrate wrote; evaluations, role play and questionnaire in it are found by themselves."""
    evaluation: str = ""
    """Evaluations to report (JSON of pipeline.evaluate), comma-separated; default those in the run's folder."""
    also: str = ""
    """Evaluations of other runs, files or run folders, comma-separated: for the plot of separation against perplexity,
    where the points of one criterion are joined."""
    output: Path | None = None
    """HTML file; default RUN/report.html. Its plots are written beside it."""
    layers: bool = True
    """Read the masks and map where they remove."""
    title: str = ""
    """Title of the page."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)
        self.output = Path(self.output) if self.output else self.run / "report.html"


@dataclass
class AnalyseConfig:
    """Which masks to compare, and how."""

    run: Path
    """Folder that pipeline.calibrate wrote."""
    pairs: str = ""
    """Only these pairs of opposing personas, comma-separated by their first persona; default all."""
    questions: int = 32
    """Held-out questions of every pair on which inner states are compared; 0 compares the masks only, without a
    model."""
    restore: int = 0
    """Also measure the separation of every pair with so many runs of blocks left unmasked, one after another, and with
    all attention or all MLP layers so; 0 does not."""
    samples: int = 24
    """--restore: at most so many held-out items per pair, drawn with the seed; 0 takes all."""
    data: str = ""
    """Where questions and items come from, as for pipeline.evaluate."""
    model: str = ""
    """Model to load instead of the one in the manifest (it must have the same weights)."""
    precision: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto."""
    gamma: float = 0.0
    """Soft gate: share of a removed weight that stays, in [0, 1) (eq. 7)."""
    max_length: int = 1024
    """Longest sequence in tokens."""
    batch_tokens: int = 2048
    """Tokens of a padded batch."""
    bootstrap: int = 2000
    """Resamples for the 95 % intervals."""
    json: Path | None = None
    """Write the numbers here (schema in docs/analyse.md); default RUN/analysis.json."""
    plot: Path | None = None
    """PNG; default RUN/analysis.png."""
    seed: int = 0
    """Seed of the draws and the bootstrap."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)
        self.json = Path(self.json) if self.json else self.run / "analysis.json"
        self.plot = Path(self.plot) if self.plot else self.run / "analysis.png"
        evaluation_options(self)
        if self.restore < 0:
            raise UserError(f"--restore must be a number of at least 0, got {self.restore}")


@dataclass
class InspectConfig:
    """Which run to look at."""

    run: Path
    """Folder that pipeline.calibrate wrote."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)


@dataclass
class StudyConfig:
    """What to calibrate and evaluate again and again, and where to keep it."""

    output: Path
    """Folder of the study: a run and its evaluation for every cell. Cells that are there are not made again, so a
    study that was stopped goes on, and one with more sets or seeds adds to what there is."""
    sets: str = "dichotomies"
    """Pairs of personas, each in cells of its own, comma-separated: what --personas of pipeline.calibrate takes, and
    behind an @ the held-out items where no set is shipped: wealth/averse=train.csv@test.csv."""
    seeds: str = "0"
    """Seeds of the calibration, comma-separated: a seed draws the items and the directions that are looked at."""
    vary: str = ""
    """Options of pipeline.calibrate and their values, every combination a column of cells:
    "samples=16|32|64|128" or "criterion=first-order|wanda; sparsity=0.01|0.02"."""
    calibrate: str = ""
    """Further options of every calibration, as on the command line of pipeline.calibrate."""
    evaluate: str = "--no-options"
    """Options of every evaluation, as on the command line of pipeline.evaluate."""
    keep_masks: bool = True
    """Keep the masks of every cell, not only what was measured."""
    others: bool = False
    """Also measure every set under the masks of the other sets, of the same seed and values: what a mask of another
    trait does to it."""

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        if self.others and not self.keep_masks:
            raise UserError("--others needs the masks of all cells; leave --no-keep-masks away")
        if self.others and len(self.pairs) < 2:
            raise UserError("--others needs several --sets")
        self.grid()

    @property
    def numbers(self) -> list[int]:
        """The seeds."""
        try:
            return [int(part) for part in self.seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds {self.seeds!r}: expected whole numbers with commas between them") from None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What to calibrate on and what to evaluate on ("": the shipped test split), set by set."""
        found: list[tuple[str, str]] = []
        for part in filter(None, (p.strip() for p in self.sets.split(","))):
            source, _, held_out = part.partition("@")
            found += [(name, "") for name in DICHOTOMIES] if part == "dichotomies" else [(source, held_out)]
        if not found:
            raise UserError("--sets names no personas")
        return found

    def grid(self) -> list[dict[str, str]]:
        """Every combination of the varied options' values; one without any if nothing is varied."""
        names, values = [], []
        for part in filter(None, (p.strip() for p in self.vary.split(";"))):
            name, equals, rest = part.partition("=")
            given = [value.strip() for value in rest.split("|")]
            if not (equals and name.strip() and all(given)):
                raise UserError(f"--vary {part!r}: expected OPTION=VALUE|VALUE")
            names.append(name.strip().removeprefix("--"))
            values.append(given)
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
