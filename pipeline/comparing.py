"""Tables of what masks have in common, and their entries in JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.analysis import Overlap, Related, grouped, kind_of
from pipeline.config import FIRST_ORDER
from pipeline.restoring import WHOLE, Restored
from pipeline.similarity import Similarity

LINES = 10
"""About so many layers are printed; the JSON has all."""


def entry(part: Overlap) -> dict[str, Any]:
    """An overlap as it stands in the JSON (docs/analyse.md)."""
    return {
        "size": part.size,
        "removed_a": part.removed_a,
        "removed_b": part.removed_b,
        "removed_both": part.removed_both,
        "difference": part.difference,
        "jaccard": part.jaccard,
        "chance": part.chance,
        "lift": part.lift,
    }


def pool_of(manifest: Mapping[str, Any]) -> float:
    """Share of every row that the run's criterion chose from, 1 if from all."""
    if manifest["criterion"] not in FIRST_ORDER or manifest["criterion"] == "first-order-gate":
        return 1.0
    return float(manifest["options"].get("pool", 1.0))


def print_pair(a: str, b: str, parts: Mapping[str, Overlap]) -> None:
    """What the two poles of a pair remove, by kind of layer, on stdout."""
    table = _table(f"{a} and {b}: what they remove", ("layers", a, b, "kept by one only", "Jaccard", "chance", "lift"))
    for name, part in (*grouped(parts, kind_of).items(), *grouped(parts, lambda _: "all layers").items()):
        shares = (f"{share:.2%}" for share in part.shares)
        table.add_row(name, *shares, f"{part.difference:.2%}", f"{part.jaccard:.3f}", f"{part.chance:.3f}", _lift(part))
    _print(table)


def print_related(others: Sequence[Related], names: Sequence[str], pool: float) -> None:
    """Overlap of what any two personas remove, over chance: the means by kinship, and a matrix of ``names``."""
    if not others:
        return
    groups: dict[str, list[Related]] = {}
    for one in others:
        groups.setdefault("opposed" if one.opposed else "others", []).append(one)
        if one.shared is not None and not one.opposed:
            groups.setdefault(f"types that share {one.shared} letters", []).append(one)
    table = _table("overlap of what two personas remove", ("personas", "pairs", "Jaccard", "chance", "lift"))
    for name, group in sorted(groups.items()):
        whole = grouped({str(n): one.overlap for n, one in enumerate(group)}, lambda _: "")[""]
        table.add_row(name, str(len(group)), f"{whole.jaccard:.3f}", f"{whole.chance:.3f}", _lift(whole))
    _print(table)
    if pool < 1:
        print(
            f"the criterion chose from {pool:.0%} of every row: with one pool for all, chance would be {1 / pool:.1f}"
        )
    if len(names) > 2:
        lifts = {(one.a, one.b): _lift(one.overlap) for one in others}
        matrix = _table("lift", ("", *names))
        for a in names:
            matrix.add_row(a, *("" if a == b else lifts.get((a, b)) or lifts[b, a] for b in names))
        _print(matrix)


def print_similarity(a: str, b: str, rows: Mapping[str, Sequence[Similarity]]) -> None:
    """Inner states under the two masks on stdout, some layers evenly spread and the last."""
    header = ("after layer", "cosine", "distance", "CKA", f"cosine of unmasked to {a}", f"to {b}")
    table = _table(f"{a} and {b}: inner states at the last token of held-out questions", header)
    last = len(rows["masks"]) - 1
    step = max(1, math.ceil(last / LINES))
    for layer in sorted({*range(0, last, step), last}):
        both, first, second = (rows[name][layer] for name in ("masks", "unmasked and a", "unmasked and b"))
        cka = "-" if math.isnan(both.cka) else f"{both.cka:.3f}"
        cells = (f"{both.cosine:.3f}", f"{both.distance:.3f}", cka, f"{first.cosine:.3f}", f"{second.cosine:.3f}")
        table.add_row(str(both.layer), *cells)
    _print(table)


def print_restored(a: str, b: str, rows: Sequence[Restored]) -> None:
    """The pair's separation with parts of the model left unmasked, on stdout."""
    n = "separation [95 %]", "shift between poles [95 %]", "shift lost"
    table = _table(f"{a} and {b}: what goes when layers are left unmasked", ("unmasked", *n))
    for row in rows:
        c = row.contrast
        table.add_row(
            row.part,
            f"{c.separation:+.0f} [{c.separation_low:+.0f}, {c.separation_high:+.0f}]",
            f"{c.shift:+.1f} [{c.shift_low:+.1f}, {c.shift_high:+.1f}]",
            "" if row.part == WHOLE or math.isnan(row.lost) else f"{row.lost:.0%}",
        )
    _print(table)


def _lift(part: Overlap) -> str:
    return "-" if part.lift is None else f"{part.lift:.2f}"


def _table(title: str, header: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    return table


def _print(table: Table) -> None:
    Console(width=max(Console().width, 110)).print(table)
