"""Plots of evaluation records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation import Record
from pipeline.tables import by_pair, conditions, cost, score

COLOURS = ("#2a6f97", "#c8553d")
"""First and second pole of a pair; readable without telling red from green."""


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Two panels a pair: each pole's score under every condition, and the shift of its margin with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_pair(records)
    # A condition's label has two lines, so the rows of panels grow with their conditions.
    heights = [0.9 + 0.36 * len(conditions(group)) for group in groups.values()]
    options: dict[str, Any] = {"figsize": (11, 0.6 + sum(heights)), "height_ratios": heights, "sharey": "row"}
    figure, axes = pyplot.subplots(len(groups), 2, squeeze=False, layout="constrained", **options)
    for (left, right), ((pair, form), group) in zip(axes, groups.items(), strict=True):
        present = conditions(group)
        for colour, offset, persona in zip(COLOURS, (-0.14, 0.14), pair.split("/"), strict=True):
            own = {r.condition: r for r in group if r.persona == persona}
            places = [i + offset for i, c in enumerate(present) if c in own]
            chosen = [own[c] for c in present if c in own]
            left.plot([100 * score(r) for r in chosen], places, "o", color=colour, label=persona)
            shifts = [r.margin_shift for r in chosen]
            # A bootstrap interval of few items can miss the mean by a rounding error.
            below = [max(0.0, r.margin_shift - r.ci_low) for r in chosen]
            errors = [below, [max(0.0, r.ci_high - r.margin_shift) for r in chosen]]
            right.errorbar(shifts, places, xerr=errors, fmt="o", color=colour, capsize=3)
        _label(left, right, present, group, pair, form)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG under a temporary name, rename it, and close it. Raises OSError."""
    from matplotlib import pyplot

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
    left.set_yticks(range(len(present)), [_with_cost(c, group) for c in present], fontsize=8)
    left.invert_yaxis()
    left.set_title(f"{pair} ({form}, n = {group[0].n})", fontsize=10, loc="left")
    left.set_xlabel("AUC, %" if group[0].auc is not None else "accuracy (length-normalised), %", fontsize=9)
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.55, 1.0), ncols=2, frameon=False)
    right.axvline(0, color="0.6", linewidth=1, linestyle=":")
    right.set_xlabel("margin shift towards the pole, nats (95 % interval)", fontsize=9)


def _with_cost(condition: str, group: Sequence[Record]) -> str:
    costs = sorted({round(r.perplexity, 1) for r in group if r.condition == condition})
    text = "/".join(map(cost, costs))
    return f"{condition}\nppl {text}"
