"""The tables of a study for the terminal."""

from collections.abc import Sequence
from typing import Any

from pipeline.protocol import STATEMENT
from pipeline.tally import Mean, Row
from pipeline.terminal import printable


def print_study(rows: Sequence[Row], means: Sequence[Mean]) -> None:
    """On stdout, a table of what every cell's own masks do, and one of the means over sets of every condition."""
    from rich.console import Console

    # Narrower, the columns that may wrap, which say what a row is of, would be left nothing.
    console = Console(width=max(Console().width, 190))
    varied = any(row.label for row in rows)
    console.print(_cells_table([row for row in rows if row.condition == "own mask"], varied))
    console.print(_means_table(means, varied))


def _cells_table(rows: Sequence[Row], varied: bool) -> Any:
    from rich.table import Table

    table = Table(title="own masks; first/second pole", title_justify="left")
    table.add_column("set")
    for name in (*(("options",) if varied else ()), "seed", "items", "removed, %", "separation [95 %]", "shift, nats"):
        table.add_column(name, justify="right", no_wrap=name != "options")
    for name in ("own answers", "perplexity, %", "repeats, points", "Yes half", "No half", "p(Yes)+p(No)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            printable(row.set),
            *((printable(row.label),) if varied else ()),
            str(row.seed),
            f"{row.n} {'statements' if row.form == STATEMENT else 'pairs'}",
            "/".join(f"{100 * share:.1f}" for share in row.removed),
            f"{row.separation:+.0f} [{row.low:+.0f}, {row.high:+.0f}]",
            f"{row.shift:+.1f}",
            "/".join(f"{value:+.2f}" for value in row.own),
            _points(row.cost),
            _points(row.repeats),
            _points(row.yes),
            _points(row.no),
            "/".join(f"{value:.1f} x" for value in row.mass) if row.mass else "",
        )
    return table


def _means_table(means: Sequence[Mean], varied: bool) -> Any:
    from rich.table import Table

    table = Table(title="means over sets and seeds, every condition", title_justify="left")
    for name in (*(("options",) if varied else ()), "criterion", "condition"):
        table.add_column(name)
    for name in (
        "cells",
        "above, below zero",
        "separation",
        "seed by seed",
        "own answers",
        "perplexity, %",
        "repeats, points",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for mean in means:
        table.add_row(
            *((printable(mean.label),) if varied else ()),
            mean.criterion,
            mean.condition,
            str(mean.cells),
            f"{mean.above}, {mean.below}",
            f"{mean.separation:+.1f}",
            ", ".join(f"{value:+.1f}" for value in mean.seeds) if len(mean.seeds) > 1 else "",
            f"{mean.own:+.2f}",
            f"{100 * mean.cost:+.1f}",
            "" if mean.repeats is None else f"{100 * mean.repeats:+.0f}",
        )
    return table


def _points(values: Sequence[float | None] | None) -> str:
    """Shares in points, "-" for an unknown one; "" if all are."""
    if values is None or all(value is None for value in values):
        return ""
    return "/".join("-" if value is None else f"{100 * value:+.0f}" for value in values)
