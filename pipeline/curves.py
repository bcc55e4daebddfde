"""What a mask does and costs over the values of one option: one line per set, the mean over sets in bold."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.figures import MARKERS, PALETTE
from pipeline.plots import save_figure
from pipeline.tally import Row, number_of


def curves_plot(rows: Sequence[Row], path: Path) -> bool:
    """Separation and change of perplexity of the own masks over the varied number.

    Seeds are averaged. Draws nothing and returns False where no single number was varied.
    """
    own = [(number_of(row.label), row) for row in rows if row.condition == "own mask"]
    values = sorted({value for value, _ in own})
    if len(values) < 2 or any(map(math.isnan, values)):
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(row.set for _, row in own))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for number, name in enumerate(sets):
        style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)], "label": name}
        _lines(left, right, values, [(v, row) for v, row in own if row.set == name], style | {"linewidth": 1})
    if len(sets) > 1:
        _lines(left, right, values, own, {"color": "black", "linewidth": 2.5, "label": "mean"})
    option = own[0][1].label.partition("=")[0]
    for axis, what in ((left, "separation, points"), (right, "change of perplexity on neutral text, %")):
        axis.axhline(0, color="0.6", linewidth=1, linestyle=":")
        axis.set_xlabel(f"--{option}")
        axis.set_ylabel(what)
        if values[0] > 0 and values[-1] >= 8 * values[0]:
            axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=5)
    save_figure(figure, path)
    return True


def _lines(
    left: Any, right: Any, values: Sequence[float], own: Sequence[tuple[float, Row]], style: dict[str, Any]
) -> None:
    at = {value: [row for other, row in own if other == value] for value in values}
    known = [value for value in values if at[value]]
    left.plot(known, [statistics.fmean(row.separation for row in at[v]) for v in known], **style)
    right.plot(known, [100 * statistics.fmean(c for row in at[v] for c in row.cost) for v in known], **style)
