"""Plots of the questionnaire: a radar per pair of personas, a heat map of all (paper: figures 2 and 3)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.catalogue import DICHOTOMIES
from pipeline.mbti import Lean, signs_of
from pipeline.plots import COLOURS, save_figure
from pipeline.protocol import FREE, OPTIONS

SPOKES = [pole for place in (0, 1) for pole in (name.split("-")[place] for name in DICHOTOMIES)]
"""The eight poles around the circle, each opposite its opponent."""


def margins_of(leans: Sequence[Lean], persona: str | None, form: str) -> dict[str, float]:
    """Pole -> mean margin towards it; of two opponents one is the negative of the other."""
    found: dict[str, float] = {}
    for lean in leans:
        if (lean.persona, lean.form) == (persona, form):
            plus, minus = lean.dichotomy.split("-")
            found |= {plus: lean.margin, minus: -lean.margin}
    return found


def radar(leans: Sequence[Lean], opponents: Mapping[str, str], path: Path, title: str) -> None:
    """One panel a pair of opposing personas, the unmasked model behind both; free form, nats per token.

    The radius is the margin towards the pole that the spoke names; the bold ring is a margin of 0.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = _pairs([lean.persona for lean in leans if lean.persona], opponents)
    columns = min(4, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.6 * columns, 0.5 + 3.9 * rows),
        squeeze=False,
        layout="constrained",
        subplot_kw={"projection": "polar"},
    )
    reach = 1.1 * max((abs(lean.margin) for lean in leans if lean.form == FREE), default=1) or 1
    for number, axis in enumerate(axes.flat):
        if number >= len(pairs):
            axis.set_visible(False)
            continue
        _ring(axis, margins_of(leans, None, FREE), "0.45", ":", "", "unmasked")
        for persona, colour, style, marker in zip(pairs[number], COLOURS, ("-", "--"), "os", strict=False):
            _ring(axis, margins_of(leans, persona, FREE), colour, style, marker, persona)
        _dress(axis, reach)
    figure.suptitle(f"margin towards each pole, nats per token\n{title}", fontsize=10)
    save_figure(figure, path)


def _pairs(personas: Sequence[str], opponents: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Every persona once, beside its opponent where that is there too."""
    pairs: list[tuple[str, ...]] = []
    for persona in dict.fromkeys(personas):
        if not any(persona in pair for pair in pairs):
            other = opponents.get(persona)
            pairs.append((persona, other) if other in personas and other is not None else (persona,))
    return pairs


def _ring(axis: Any, margins: Mapping[str, float], colour: str, style: str, marker: str, label: str) -> None:
    spokes = [spoke for spoke in SPOKES if spoke in margins]
    angles = [2 * math.pi * SPOKES.index(spoke) / len(SPOKES) for spoke in spokes]
    values = [margins[spoke] for spoke in spokes]
    axis.plot(
        [*angles, *angles[:1]],
        [*values, *values[:1]],
        linestyle=style,
        marker=marker,
        markersize=4,
        color=colour,
        label=label,
        linewidth=1.6,
    )


def _dress(axis: Any, reach: float) -> None:
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_rlim(-reach, reach)
    axis.set_xticks([2 * math.pi * n / len(SPOKES) for n in range(len(SPOKES))], SPOKES, fontsize=8)
    axis.tick_params(axis="x", pad=8)
    axis.set_yticks([0.0], ["0"], fontsize=7, color="0.35")
    circle = [2 * math.pi * n / 90 for n in range(91)]
    axis.plot(circle, [0.0] * len(circle), color="0.6", linewidth=1)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=3, frameon=False)


def heat_map(leans: Sequence[Lean], opponents: Mapping[str, str], path: Path, title: str) -> None:
    """A row a mask, a column a dichotomy, both forms: the shift from the unmasked model, in nats.

    A box is drawn where the sign is the persona's own; orange is towards the first pole, violet towards the second.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(lean.persona for lean in leans if lean.persona))
    figure, axes = pyplot.subplots(
        1, 2, figsize=(11, 1.9 + 0.34 * len(names)), squeeze=False, layout="constrained", sharey=True
    )
    for axis, form in zip(axes.flat, (FREE, OPTIONS), strict=True):
        by = {(lean.persona, lean.dichotomy): lean.shift for lean in leans if lean.form == form}
        columns = [name for name in DICHOTOMIES if (names[0], name) in by]
        values = [[by[name, column] for column in columns] for name in names]
        reach = max(abs(value) for row in values for value in row) or 1
        image = axis.imshow(values, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
        for row, name in enumerate(names):
            for column, dichotomy in enumerate(columns):
                _cell(axis, row, column, values[row][column], reach, signs_of(name).get(dichotomy, 0))
        axis.set_xticks(range(len(columns)), [column.replace("-", "\n- ") for column in columns], fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{form}", fontsize=10, loc="left")
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(
        f"shift from the unmasked model towards the first pole, nats; boxed: the sign is right\n{title}", fontsize=10
    )
    save_figure(figure, path)


def _cell(axis: Any, row: int, column: int, value: float, reach: float, sign: int) -> None:
    from matplotlib.patches import Rectangle

    dark = abs(value) > 0.6 * reach
    axis.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    if sign * value > 0:
        axis.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="black", linewidth=1.3))
