"""The parts of the HTML report about personas: role play, questionnaire, where masks remove (docs/report.md)."""

from collections.abc import Sequence
from typing import Any

from pipeline.analysis import Overlap, grouped, kind_of
from pipeline.data.catalogue import DICHOTOMIES
from pipeline.gathered import Gathered
from pipeline.page import Html, details, join, paragraph, table
from pipeline.sections import interval, perplexity


def roleplay(found: Gathered) -> Html:
    """Accuracy of every character under every condition."""
    tables = []
    for name in dict.fromkeys(record.persona for record in found.role_records):
        group = [record for record in found.role_records if record.persona == name]
        rows = []
        for r in group:
            plain = r.condition == "unmasked"
            rows.append(
                [
                    r.condition,
                    f"{r.removed:.1%}" if r.removed else "",
                    f"{r.accuracy:.0%} [{r.low:.0%}, {r.high:.0%}]",
                    "" if plain else interval(100 * r.gain, 100 * r.gain_low, 100 * r.gain_high, 0),
                    "" if plain else f"{r.raised:.0%} [{r.raised_low:.0%}, {r.raised_high:.0%}]",
                    "" if plain else f"{r.own_line_change:+.2f}",
                    perplexity(r.perplexity),
                ]
            )
        header = (
            "condition",
            "removed",
            "accuracy",
            "gain, points",
            "raised most",
            "own line, nats per token",
            "perplexity",
        )
        caption = f"{name or 'mean of all characters'}: {group[0].n} items, chance {group[0].chance:.0%}"
        tables.append(table(header, rows, caption=caption, main="own mask"))
    # The mean first, one character after another folded below it.
    head, rest = (
        (tables[-1:], tables[:-1]) if found.role_records and found.role_records[-1].persona is None else (tables, [])
    )
    return join([*head, *([details("every character", join(rest))] if rest else [])])


def profile(found: Gathered) -> Html:
    """The questionnaire's margins, shifts and signs; one table a form."""
    parts: list[Html] = []
    for form in dict.fromkeys(lean.form for lean in found.leans):
        rows = []
        for one in (s for s in found.signs if s.form == form):
            own = {x.dichotomy: x for x in found.leans if (x.persona, x.form) == (one.persona, form)}
            cells = [_lean(own.get(name), bool(one.persona)) for name in DICHOTOMIES]
            counts = [f"{n}/{one.expected}" if one.persona else "" for n in (one.right_zero, one.right_unmasked)]
            rows.append([one.persona or "unmasked", *cells, one.spelled, *counts])
        header = ("state", *DICHOTOMIES, "spells", "right from zero", "right from unmasked")
        parts.append(table(header, rows, caption=f"{form}: margin towards the first pole, nats (shift from unmasked)"))
        for s in (s for s in found.summaries if s.form == form and s.types):
            parts.append(
                paragraph(
                    f"{form}: of {s.types} types, all four signs are right for {s.all_right_zero} from zero and for "
                    f"{s.all_right_unmasked} from the unmasked model; by chance {s.types * s.chance:.1f}."
                )
            )
    return join(parts)


def _lean(lean: Any, masked: bool) -> str:
    if lean is None:
        return "-"
    return f"{lean.margin:+.2f}" + (f" ({lean.shift:+.2f})" if masked else "")


def layers(pairs: Sequence[tuple[str, str, dict[str, Overlap]]]) -> Html:
    """What each of a pair removes, and what both do, against chance: over all layers, and folded by kind of layer."""
    whole = [(f"{a}, {b}", grouped(parts, lambda _: "")[""]) for a, b, parts in pairs]
    folded = [
        details(f"{a} and {b} by kind of layer", overlap_table("layers", list(grouped(parts, kind_of).items())))
        for a, b, parts in pairs
    ]
    return join([overlap_table("pair", whole), *folded])


def overlap_table(what: str, rows: Sequence[tuple[str, Overlap]]) -> Html:
    """Overlaps in a table; ``what`` is over their names."""
    header = (
        what,
        "first removes",
        "second removes",
        "kept by one only",
        "Jaccard of the removed",
        "by chance",
        "lift",
    )
    cells = [
        [
            name,
            *(f"{share:.2%}" for share in part.shares),
            f"{part.difference:.2%}",
            f"{part.jaccard:.3f}",
            f"{part.chance:.3f}",
            "-" if part.lift is None else f"{part.lift:.2f}",
        ]
        for name, part in rows
    ]
    return table(header, cells)
