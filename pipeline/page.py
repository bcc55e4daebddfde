"""One HTML page without anything from outside: escaping, tables, figures, the style."""

import base64
import html
import struct
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5a6675; --line: #d5dbe2; --back: #ffffff; --card: #f5f7f9;
  --accent: #1f5f85; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #a3afbb; --line: #3a444f; --back: #14191f; --card: #1d242c; --accent: #86bfe3; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 0.6rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 0.4rem; }
p, li { max-width: 50rem; }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; list-style: none; padding: 0; margin: 0.6rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.6rem 0 1rem; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.3rem; caption-side: top; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600;
  white-space: normal; vertical-align: bottom; min-width: 4.5rem; }
tr.main td, tr.main th { font-weight: 700; background: var(--card); }
table.facts td, table.facts th { text-align: left; white-space: normal; vertical-align: top;
  overflow-wrap: anywhere; }
table.facts th { white-space: nowrap; color: var(--soft); font-weight: 600; }
figure { margin: 0.6rem 0 1.2rem; }
figure img { display: block; background: #ffffff; border-radius: 6px; height: auto;
  max-width: max(100%, var(--least)); }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--accent); }
.card { background: var(--card); border-radius: 8px; padding: 0.7rem 1rem; margin: 0.8rem 0; }
.card p { margin: 0.4rem 0; white-space: pre-wrap; }
.card .who { font-weight: 600; color: var(--accent); }
code { font-size: 0.88em; }
@media (max-width: 40rem) { body { padding: 0.8rem; font-size: 15px; } h1 { font-size: 1.35rem; } }
@media print { body { max-width: none; } details { display: block; } }
"""


SCREEN, PRINTED = 96, 130
"""Dots per inch of a screen as CSS counts them, and of the plots (``pipeline.plots.save_figure``)."""

LEGIBLE = 0.65
"""A plot is not shrunk below this share of its size; a narrower screen scrolls."""


class Html(str):
    """Text that is HTML already; every other text is escaped where it enters a page."""


def text(value: object) -> Html:
    """``value`` as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Sequence[object]) -> Html:
    """The parts one after another."""
    return Html("\n".join(text(part) for part in parts))


def paragraph(content: object, kind: str = "") -> Html:
    """A paragraph, of the style ``kind``."""
    return Html(f"<p{_kind(kind)}>{text(content)}</p>")


def table(header: Sequence[object], rows: Sequence[Sequence[object]], *, caption: object = "", main: str = "") -> Html:
    """A table that scrolls sideways where it is too wide; rows whose first cell is ``main`` stand out."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "\n".join(_row(row, bool(main) and row[0] == main) for row in rows)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    inside = f"{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return Html(f'<div class="scroll" tabindex="0"><table>{inside}</table></div>')


def facts(pairs: Sequence[tuple[object, object]]) -> Html:
    """A table of names and values, which wraps."""
    body = "\n".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in pairs)
    return Html(f'<div class="scroll"><table class="facts"><tbody>{body}</tbody></table></div>')


def _row(cells: Sequence[object], main: bool) -> str:
    first, *rest = cells
    kind = ' class="main"' if main else ""
    return f'<tr{kind}><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'


def figure(png: bytes, alt: str, caption: object = "") -> Html:
    """A PNG inside the page at its own size; a narrow screen shrinks it, as long as its words can be read."""
    width, height = (round(side * SCREEN / PRINTED) for side in struct.unpack(">II", png[16:24]))
    size = f'width="{width}" height="{height}" style="--least: {round(LEGIBLE * width)}px"'
    data = base64.b64encode(png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{text(alt)}" {size}>'
    scroll = f'<div class="scroll" tabindex="0">{image}</div>'
    return Html(f"<figure>{scroll}<figcaption>{text(caption)}</figcaption></figure>")


def details(summary: object, content: object) -> Html:
    """Folded away until it is asked for."""
    return Html(f"<details><summary>{text(summary)}</summary>{text(content)}</details>")


def section(name: str, title: object, content: object) -> Html:
    """A part of the page that can be linked to."""
    return Html(f'<section id="{text(name)}"><h2>{text(title)}</h2>\n{text(content)}</section>')


def page(title: str, lead: object, sections: Sequence[tuple[str, str, Html]]) -> Html:
    """The whole page: ``sections`` are names, titles and contents; those without content are left out.

    The policy in its head forbids the browser to load anything.
    """
    shown = [(name, heading, content) for name, heading, content in sections if content]
    links = "".join(f'<li><a href="#{text(name)}">{text(heading)}</a></li>' for name, heading, _ in shown)
    body = "\n".join(section(*one) for one in shown)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return Html(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{text(title)}</h1>
{text(lead)}
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{body}
</main>
</body>
</html>
"""
    )


def _kind(kind: str) -> str:
    return f' class="{text(kind)}"' if kind else ""
