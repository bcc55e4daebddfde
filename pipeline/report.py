"""Tables for the terminal and a plot of evaluation records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation import CONDITIONS, Record

COLOURS = ("#2a6f97", "#c8553d")
"""First and second pole of a pair; readable without telling red from green."""


def separation(records: Sequence[Record], condition: str, form: str) -> float:
    """Points of separation of one pair: score of + under its condition plus that of - under its, minus 100.

    The score is the length-normalised accuracy, or the AUC of statements.
    """
    chosen = [r for r in records if r.condition == condition and r.form == form]
    return 100 * sum(score(r) for r in chosen) - 100


def score(record: Record) -> float:
    """What a record is judged by: AUC for statements, else length-normalised accuracy."""
    return record.score_normalised if record.auc is None else record.auc


def by_pair(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records grouped by pair and form, in order."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.pair, record.form), []).append(record)
    return groups


def print_table(records: Sequence[Record], criterion: str) -> None:
    """One table per pair and form on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for (pair, form), group in by_pair(records).items():
        table = Table(title=f"{pair}, {group[0].n} held-out items, form: {form}, criterion: {criterion}", title_justify="left")
        for name in ("condition", "persona", "removed", "summed", "normalised", "AUC", "shift [95 %], nats", "perplexity"):
            table.add_column(name, justify="left" if name in ("condition", "persona") else "right", no_wrap=True)
        for record in group:
            table.add_row(*_row(record))
        console.print(table)
        for condition in CONDITIONS:
            points = separation(group, condition, form)
            if condition in {r.condition for r in group} and condition != "opponent mask":
                console.print(f"  separation, {condition}: {points:+.1f} points")


def _row(record: Record) -> tuple[str, ...]:
    shift = f"{record.margin_shift:+.2f} [{record.ci_low:+.2f}, {record.ci_high:+.2f}]"
    return (
        record.condition,
        record.persona,
        f"{100 * record.removed:.1f} %" if record.removed else "",
        f"{100 * record.score_sum:.1f}",
        f"{100 * record.score_normalised:.1f}",
        "" if record.auc is None else f"{100 * record.auc:.1f}",
        "" if record.condition == "unmasked" else shift,
        f"{record.perplexity:.1f}" if record.perplexity < 1e5 else f"{record.perplexity:.1e}",
    )


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Two panels a pair: each pole's score under every condition, and the shift of its margin with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_pair(records)
    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(11, 0.6 + 2.3 * len(groups)), squeeze=False, layout="constrained", sharey="row"
    )
    for (left, right), ((pair, form), group) in zip(axes, groups.items(), strict=True):
        present = [c for c in CONDITIONS if any(r.condition == c for r in group)]
        for colour, offset, persona in zip(COLOURS, (-0.14, 0.14), pair.split("/"), strict=True):
            own = {r.condition: r for r in group if r.persona == persona}
            places = [i + offset for i, c in enumerate(present) if c in own]
            chosen = [own[c] for c in present if c in own]
            left.plot([100 * score(r) for r in chosen], places, "o", color=colour, label=persona)
            shifts = [r.margin_shift for r in chosen]
            errors = [[r.margin_shift - r.ci_low for r in chosen], [r.ci_high - r.margin_shift for r in chosen]]
            right.errorbar(shifts, places, xerr=errors, fmt="o", color=colour, capsize=3)
        _label(left, right, present, group, pair, form)
    figure.suptitle(title, fontsize=11)
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, dpi=130)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def _label(left: Any, right: Any, present: Sequence[str], group: Sequence[Record], pair: str, form: str) -> None:
    left.axvline(50, color="0.6", linewidth=1, linestyle=":")
    left.set_xlim(-2, 102)
    left.set_yticks(range(len(present)), [_with_cost(c, group) for c in present])
    left.invert_yaxis()
    left.set_title(f"{pair} ({form}, n = {group[0].n})", fontsize=10, loc="left")
    left.set_xlabel("AUC, %" if group[0].auc is not None else "accuracy (length-normalised), %", fontsize=9)
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.55, 1.0), ncols=2, frameon=False)
    right.axvline(0, color="0.6", linewidth=1, linestyle=":")
    right.set_xlabel("margin shift towards the pole, nats (95 % interval)", fontsize=9)


def _with_cost(condition: str, group: Sequence[Record]) -> str:
    costs = sorted({round(r.perplexity, 1) for r in group if r.condition == condition})
    text = "/".join(f"{c:.1f}" if c < 1e5 else f"{c:.0e}" for c in costs)
    return f"{condition}\nppl {text}"
