"""Tables for the terminal, and what tables and plots have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.evaluation import HALF, Contrast, Record, place
from pipeline.terminal import printable


def score(record: Record) -> float:
    """What a record is judged by: AUC for statements, else length-normalised accuracy."""
    return record.score_normalised if record.auc is None else record.auc


def conditions(records: Sequence[Record]) -> list[str]:
    """The conditions among the records, in the order of the table."""
    return sorted({record.condition for record in records}, key=place)


def by_pair(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Records grouped by pair and form, in order."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.pair, record.form), []).append(record)
    return groups


def print_table(records: Sequence[Record], contrasts: Sequence[Contrast], criterion: str) -> None:
    """One table per pair and form on stdout: a line per condition, both poles as +/-.

    "own answers" is the change of their log-probability against the unmasked model, nats per token.
    """
    from rich.console import Console
    from rich.table import Table

    terminal = Console()
    console = Console(width=max(terminal.width, 136))
    for (pair, form), group in by_pair(records).items():
        statements = group[0].auc is not None
        table = Table(title=f"{pair}, {group[0].n} held-out items, {form}, {criterion}", title_justify="left")
        for name in ("condition", "removed", "summed", "AUC" if statements else "normalised"):
            table.add_column(name, justify="left" if name == "condition" else "right", no_wrap=True)
        for name in ("separation [95 %]", "shift between poles [95 %]", "own answers", "perplexity"):
            table.add_column(name, justify="right", no_wrap=True)
        unmasked = {r.persona: r.own_answer for r in group if r.condition == "unmasked"}
        for condition in conditions(group):
            plus, minus = (
                next(r for r in group if (r.condition, r.persona) == (condition, p)) for p in pair.split("/")
            )
            contrast = next((c for c in contrasts if (c.pair, c.form, c.condition) == (pair, form, condition)), None)
            table.add_row(*_row(plus, minus, contrast, unmasked))
        console.print(table)
        if said := without_yes_or_no(contrasts, pair, form, group[0].n):
            console.print(said, highlight=False, soft_wrap=True)


def without_yes_or_no(contrasts: Sequence[Contrast], pair: str, form: str, items: int) -> str:
    """How far the answers that do not begin with Yes or No separate, in a sentence; "" where fewer than ``HALF``
    others do.

    Where one pole says Yes to most questions and the other No, a mask that says so to all of them separates these.
    """
    found = {c.condition: c for c in contrasts if (c.pair, c.form) == (pair, form) and c.separation_plain is not None}
    rows = [found[name] for name in sorted(found, key=place) if name != "opponent mask"]
    if not rows or items - (rows[0].n_plain or 0) < HALF:
        return ""
    said = []
    for c in rows:
        value, low, high = c.separation_plain or 0.0, c.separation_plain_low or 0.0, c.separation_plain_high or 0.0
        said.append(f"{c.condition} {_interval(value, low, high, 0)}")
    count = rows[0].n_plain
    return f"{pair}, the {count} items where neither answer begins with Yes or No: separation {', '.join(said)}"


def print_generation(generation: Sequence[dict[str, Any]], count: int) -> None:
    """On stdout, the first ``count`` questions of the first pair with every answer, then the means of all pairs.

    Beside an answer: its length in tokens, the share of repeated 3-grams, and the judged margin in nats per token
    towards the pair's first pole (docs/evaluation.md).
    """
    if not generation:
        return
    first = [entry for entry in generation if entry["pair"] == generation[0]["pair"]]
    for number in range(min(count, first[0]["n"])):
        print(printable(f"\nQ: {first[0]['answers'][number]['question']}"))
        for entry in first:
            text = entry["answers"][number]
            print(printable(f"  {_speaker(entry)}: {text['answer']}"))
            print(f"      {_measures(text)}")
    print()
    for entry in generation if generation[0]["n"] > 1 else []:
        more = ""
        if entry["condition"] != "unmasked":
            value, low, high = (100 * entry[f"repeated_more{end}"] for end in ("", "_low", "_high"))
            more = f", repeats {_interval(value, low, high, 0)} points"
        print(f"{entry['pair']}, mean of {entry['n']} answers, {_speaker(entry)}: {_measures(entry)}{more}")


def _speaker(entry: dict[str, Any]) -> str:
    """A mask's persona speaks in its own name; whose words were drawn is said."""
    drawn = f", temperature {entry['temperature']:g}" if entry["temperature"] else ""
    if entry["persona"] is None:
        return entry["condition"] + drawn
    whose = entry["persona"] if entry["condition"] == "own mask" else f"{entry['persona']} ({entry['condition']})"
    return whose + drawn


def _measures(values: dict[str, Any]) -> str:
    return f"{values['tokens']:.0f} tokens, {values['repetition']:.0%} repeated, judged {values['judged']:+.2f}"


def print_efficiency(efficiency: Sequence[dict[str, Any]]) -> None:
    """A table on stdout: what each state costs to serve, batch 1, greedy."""
    from rich.console import Console
    from rich.table import Table

    if not efficiency:
        return
    table = Table(title=f"{efficiency[0]['pair']}, cost of serving, one sequence at a time", title_justify="left")
    for name in ("condition", "prompt tokens", "first token", "tokens/s", "memory", "while it is on", "disk"):
        table.add_column(name, justify="left" if name == "condition" else "right", no_wrap=True)
    for entry in efficiency:
        table.add_row(
            f"{entry['persona']} ({entry['condition']})" if entry["persona"] else entry["condition"],
            f"{entry['prompt_tokens']:.0f}",
            f"{1000 * entry['first_token_seconds']:.0f} ms",
            f"{entry['tokens_per_second']:.1f}",
            *(_bytes(entry[name]) for name in ("memory_bytes", "working_bytes", "disk_bytes")),
        )
    Console(width=max(Console().width, 130)).print(table)


def print_abilities(abilities: Sequence[dict[str, Any]]) -> None:
    """A table on stdout: lm-eval's tasks under every setting, with twice the standard error."""
    from rich.console import Console
    from rich.table import Table

    if not abilities:
        return
    table = Table(title="tasks of lm-eval", title_justify="left")
    for name in ("task", "metric", "condition", "value", "n"):
        table.add_column(name, justify="right" if name in ("value", "n") else "left", no_wrap=True)
    for e in sorted(abilities, key=lambda e: (e["task"], e["metric"])):
        spread = "" if e["stderr"] is None else f" ± {2 * e['stderr']:.3f}"
        state = f"{e['persona']} ({e['condition']})" if e["persona"] else e["condition"]
        table.add_row(e["task"], e["metric"], printable(state), f"{e['value']:.3f}{spread}", str(e["n"] or ""))
    Console(width=max(Console().width, 130)).print(table)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _row(plus: Record, minus: Record, contrast: Contrast | None, unmasked: dict[str, float]) -> tuple[str, ...]:
    def both(name: Callable[[Record], float]) -> str:
        return f"{100 * name(plus):.0f}/{100 * name(minus):.0f}"

    return (
        plus.condition,
        _removed(plus.removed, minus.removed),
        both(lambda r: r.score_sum),
        both(score),
        _interval(contrast.separation, contrast.separation_low, contrast.separation_high, 0) if contrast else "",
        _interval(contrast.shift, contrast.shift_low, contrast.shift_high, 1) if contrast else "",
        "/".join(f"{r.own_answer - unmasked[r.persona]:+.2f}" for r in (plus, minus))
        if plus.condition != "unmasked"
        else "",
        cost(plus.perplexity)
        if plus.perplexity == minus.perplexity
        else f"{cost(plus.perplexity)}/{cost(minus.perplexity)}",
    )


def _removed(plus: float, minus: float) -> str:
    shares = [f"{100 * share:.1f}" for share in (plus, minus)]
    return f"{'/'.join(dict.fromkeys(shares))} %" if plus or minus else ""


def _interval(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def cost(perplexity: float) -> str:
    """A perplexity as it is shown."""
    return f"{perplexity:.1f}" if perplexity < 1e4 else f"{perplexity:.0e}"
