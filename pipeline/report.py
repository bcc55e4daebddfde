"""``python -m pipeline.report RUN``: one self-contained HTML file from what is in a run's folder."""

import hashlib
import sys
from pathlib import Path
from typing import Any

from pipeline.atomic import write_text
from pipeline.cli import note, parse, quiet_libraries, run
from pipeline.options import ReportConfig

DESCRIPTION = (
    "Write one self-contained HTML file from what is in a run's folder: what was run, the table of conditions with "
    "intervals, separation against perplexity, layer maps, sample answers, role play and questionnaire where they were "
    "measured, provenance. Its plots also lie beside it as PNG files. Nothing is measured anew."
)
SHOWN_PAIRS = 4
"""Pairs of personas in the layer maps."""


def report(config: ReportConfig) -> Path:
    """Write the report and return its path. Raises UserError for files that cannot be read or written."""
    from pipeline import sections, sections_personas
    from pipeline.gathered import gather
    from pipeline.page import page
    from pipeline.results import writing

    assert config.output is not None
    found = gather(config.run, _paths(config.evaluation), _paths(config.also))
    with writing(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        figures = _Figures(config.output)
        parts = [
            ("run", "What was run", sections.run_facts(found)),
            ("results", "Results", sections.results(found.evaluations)),
            ("cost", "Separation and its cost", _cost(found, figures)),
            ("answers", "Answers", sections.answers(found.evaluations)),
            ("roleplay", "Role play", sections_personas.roleplay(found)),
            ("questionnaire", "Questionnaire", _questionnaire(found, figures)),
            ("layers", "Where the masks remove", _layers(found, figures) if config.layers else sections.join([])),
            ("efficiency", "Cost of serving", sections.efficiency(found.evaluations)),
            ("abilities", "General ability", sections.abilities(found.evaluations)),
            ("provenance", "Provenance", sections.provenance(found, {str(f): _sha256(f) for f in found.files})),
        ]
        title = config.title or f"Persona masks of {found.manifest['model']['id']}"
        lead = sections.paragraph(f"{found.manifest['criterion']}, {', '.join(found.manifest['masks'])}", "soft")
        write_text(config.output, page(title, lead, parts))
    for path in (config.output, *figures.written):
        note(f"written: {path}")
    return config.output


class _Figures:
    """Draws plots beside the report and hands back their bytes."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.written: list[Path] = []

    def draw(self, name: str, plot: Any, *arguments: Any) -> bytes:
        path = self.output.with_name(f"{self.output.stem}-{name}.png")
        plot(*arguments, path)
        self.written.append(path)
        return path.read_bytes()


def _cost(found: Any, figures: _Figures) -> Any:
    from pipeline.figures import separation_plot
    from pipeline.gathered import points_of
    from pipeline.page import Html, figure

    points = [point for one in (*found.evaluations, *found.also) for point in points_of(one)]
    if not points:
        return Html("")
    pairs = len({pair for one in found.evaluations for pair in {r.pair for r in one.records}})
    what = "means over the pairs, without intervals" if pairs > 1 else "with 95 % intervals"
    also = f" Points of one criterion are joined; also read: {len(found.also)} evaluations." if found.also else ""
    caption = f"One point per condition, {what}. Up and to the left is better.{also}"
    return figure(figures.draw("separation", separation_plot, points), "separation over change of perplexity", caption)


def _layers(found: Any, figures: _Figures) -> Any:
    from pipeline.analysis import overlaps
    from pipeline.figures import layer_plot
    from pipeline.page import Html, figure, join, paragraph
    from pipeline.sections_personas import layers
    from pipeline.store import load_masks

    opponents = found.manifest["personas"]["opponents"]
    pairs: list[tuple[str, str]] = []
    for a, b in opponents.items():
        if a in found.manifest["masks"] and b in found.manifest["masks"] and (b, a) not in pairs:
            pairs.append((a, b))
    if not pairs:
        return Html("")
    masks = load_masks(found.run)
    shown = [(a, b, overlaps(masks, a, b)) for a, b in pairs[:SHOWN_PAIRS]]
    more = f" {len(pairs) - SHOWN_PAIRS} more pairs are left out." if len(pairs) > SHOWN_PAIRS else ""
    caption = (
        "Left and middle: share of each layer's weights that is removed. Right: removed by both, over what two random "
        "choices of as many weights in every layer would share; 1 is chance." + more
    )
    about = paragraph(
        "Jaccard of the removed: removed by both over removed by either. Lift: removed by both over what chance would "
        "share. Criteria that choose from a pool of unimportant weights share more than chance for that reason alone.",
        "soft",
    )
    return join([figure(figures.draw("layers", layer_plot, shown), "layer maps", caption), layers(shown), about])


def _questionnaire(found: Any, figures: _Figures) -> Any:
    from pipeline.page import Html, figure, join
    from pipeline.profiles import heat_map, radar
    from pipeline.sections_personas import profile

    if not found.leans or not any(lean.persona for lean in found.leans):
        return Html("")
    asked = found.questionnaire
    title = f"{asked['model']}, {asked['criterion']}, sparsity {asked['sparsity']}"
    rest = (found.leans, found.manifest["personas"]["opponents"])
    pictures = [
        figure(figures.draw(name, lambda path, plot=plot: plot(*rest, path, title)), alt)
        for name, plot, alt in (
            ("radar", radar, "radar: margin towards each pole"),
            ("heat", heat_map, "heat map: shift from the unmasked model"),
        )
    ]
    return join([profile(found), *pictures])


def _paths(text: str) -> list[Path]:
    return [Path(part.strip()) for part in text.split(",") if part.strip()]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> int:
    config = parse(ReportConfig, DESCRIPTION, argv)
    quiet_libraries()
    return run(lambda: report(config))


if __name__ == "__main__":
    sys.exit(main())
