"""Plots of the report: separation against what it costs, and where in the model the masks remove."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.analysis import Overlap, depth_of, grouped, kind_of
from pipeline.evaluation import kind, place
from pipeline.plots import COLOURS, save_figure

MARKERS = "osD^vPX*<>hp"
PALETTE = (*COLOURS, "#7a5195", "#c08a00", "#4d4d4d", "#2f9e8f")
"""Told apart by lightness and by their markers too, so no one has to tell red from green."""
STEEP = 3.0
"""From this ratio of perplexities on, the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """One condition of one evaluation: what it separates and what it costs.

    ``separation`` and its interval in points; ``ratio`` is the perplexity over the unmasked model's, mean of both
    poles. ``source`` tells evaluations apart. ``pair`` is "" for a mean over pairs, which has no interval.
    """

    source: str
    criterion: str
    condition: str
    pair: str
    separation: float
    low: float | None
    high: float | None
    ratio: float


def separation_plot(points: Sequence[Point], path: Path, each: Sequence[Point] = ()) -> None:
    """Separation over the change of perplexity; the own masks of one criterion are joined by a line.

    Other conditions are single points. ``each``, what ``points`` are means of, is pale in their colours. Points without
    a finite cost or separation are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, parts = (
        [point for point in some if math.isfinite(point.ratio) and math.isfinite(point.separation)]
        for some in (points, each)
    )
    figure, axis = pyplot.subplots(figsize=(8, 5.4), layout="constrained")
    steep = max((point.ratio for point in (*shown, *parts)), default=1) > STEEP
    criteria = list(dict.fromkeys(p.criterion for p in shown if p.condition == "own mask"))
    for number, criterion in enumerate(criteria):
        own = sorted(
            (p for p in shown if p.condition == "own mask" and p.criterion == criterion), key=lambda p: p.ratio
        )
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        _points(axis, own, steep, f"own mask, {criterion}", colour, marker, "-" if len(own) > 1 else "")
        pale = [p for p in parts if p.condition == "own mask" and p.criterion == criterion]
        _points(axis, pale, steep, "", colour, marker, "", pale=True)
    others: dict[str, list[Point]] = {}
    for point in sorted(shown, key=lambda p: place(p.condition)):
        known = kind(point.condition)
        if known not in ("own mask", "opponent mask"):
            others.setdefault(known, []).append(point)
    for number, (condition, chosen) in enumerate(others.items()):
        style = PALETTE[(number + len(criteria)) % len(PALETTE)], MARKERS[(number + len(criteria)) % len(MARKERS)]
        _points(axis, chosen, steep, condition, *style, "", hollow=True)
        pale = [p for p in parts if kind(p.condition) == condition]
        _points(axis, pale, steep, "", *style, "", hollow=True, pale=True)
    axis.axhline(0, color="0.6", linewidth=1, linestyle=":")
    if steep:
        axis.set_xscale("log")
    axis.set_xlabel(
        "perplexity on neutral text over the unmasked model's" if steep else "change of perplexity on neutral text, %"
    )
    axis.set_ylabel("separation, points (95 % interval)")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _points(
    axis: Any,
    points: Sequence[Point],
    steep: bool,
    label: str,
    colour: str,
    marker: str,
    line: str,
    *,
    hollow: bool = False,
    pale: bool = False,
) -> None:
    if not points:
        return
    across = [p.ratio if steep else 100 * (p.ratio - 1) for p in points]
    up = [p.separation for p in points]
    # An interval of few items can miss its point by a rounding error.
    errors = [
        [max(0.0, p.separation - (p.separation if p.low is None else p.low)) for p in points],
        [max(0.0, (p.separation if p.high is None else p.high) - p.separation) for p in points],
    ]
    axis.errorbar(
        across,
        up,
        yerr=errors if any(p.low is not None for p in points) else None,
        fmt=marker,
        linestyle=line,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        capsize=0 if pale else 3,
        elinewidth=1,
        markersize=4 if pale else 8,
        alpha=0.35 if pale else 1.0,
        label=label,
    )


def layer_plot(pairs: Sequence[tuple[str, str, dict[str, Overlap]]], path: Path) -> None:
    """A row a pair of personas: share removed by each, and what both remove over what chance would share.

    Columns are blocks, rows kinds of layers. The third panel's middle colour is 1, chance.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import Normalize, TwoSlopeNorm

    kinds = list(dict.fromkeys(kind_of(layer) for _, _, parts in pairs for layer in parts))
    height = 1.0 + 0.24 * len(kinds)
    figure, axes = pyplot.subplots(
        len(pairs), 3, figsize=(14, 0.4 + height * len(pairs)), squeeze=False, layout="constrained", sharey=True
    )
    share = Normalize(0, 100 * max(max(part.shares) for _, _, parts in pairs for part in parts.values()) or 1)
    for row, (a, b, parts) in zip(axes, pairs, strict=True):
        cells = grouped(parts, lambda layer: (depth_of(layer), kind_of(layer)))
        depths = sorted({depth if depth is not None else -1 for depth, _ in cells})
        for axis, which, name in zip(row, (0, 1), (a, b), strict=False):
            values = _grid(cells, kinds, depths, lambda part, which=which: 100 * part.shares[which])
            _map(figure, axis, values, kinds, depths, f"{name}: removed, %", "cividis", share)
        lift = _grid(cells, kinds, depths, lambda part: math.nan if part.lift is None else part.lift)
        reach = max([2.0, *(v for line in lift for v in line if math.isfinite(v))])
        scale = TwoSlopeNorm(vmin=0, vcenter=1, vmax=reach)
        _map(figure, row[2], lift, kinds, depths, "removed by both, times chance", "PuOr_r", scale)
    save_figure(figure, path)


def _grid(cells: Any, kinds: Sequence[str], depths: Sequence[int], value: Any) -> list[list[float]]:
    """NaN where there is no such layer."""
    return [
        [value(cells[key]) if (key := (depth if depth >= 0 else None, kind)) in cells else math.nan for depth in depths]
        for kind in kinds
    ]


def _map(
    figure: Any,
    axis: Any,
    values: Any,
    kinds: Sequence[str],
    depths: Sequence[int],
    title: str,
    colours: str,
    scale: Any,
) -> None:
    image = axis.imshow(values, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=9, loc="left")
    step = max(1, len(depths) // 10)
    places = range(0, len(depths), step)
    axis.set_xticks(places, [str(depths[n]) if depths[n] >= 0 else "-" for n in places], fontsize=7)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
    axis.set_xlabel("block", fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=7)


def analysis_plot(others: Any, names: Sequence[str], states: Any, path: Path) -> None:
    """Left, the overlap of what any two personas remove, over chance; right, inner states of each pair's two masks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    height = max(4.0, 1.6 + 0.3 * len(names))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6 + height, height), layout="constrained")
    lifts = {(one.a, one.b): one.overlap.lift for one in others}
    values = [[_known(lifts.get((a, b), lifts.get((b, a)))) for b in names] for a in names]
    reach = max([2.0, *(v for row in values for v in row if math.isfinite(v))])
    image = left.imshow(values, cmap="PuOr_r", norm=TwoSlopeNorm(vmin=0, vcenter=1, vmax=reach))
    left.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set_title("removed by both, times chance", fontsize=10, loc="left")
    figure.colorbar(image, ax=left, shrink=0.8)
    for number, ((a, b), found) in enumerate(states.items()):
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        rows = found["masks"]
        words = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.2, "label": f"{a}, {b}"}
        right.plot([row.layer for row in rows], [row.cosine for row in rows], **words)
    if states:
        right.set_xlabel("after layer (0: embeddings)")
        right.set_title("cosine of inner states under the two masks", fontsize=10, loc="left")
        right.legend(fontsize=7, frameon=False)
    else:
        right.set_visible(False)
    save_figure(figure, path)


def _known(value: float | None) -> float:
    return math.nan if value is None else value
