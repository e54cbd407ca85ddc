"""The report as one HTML file: no script, no link to anything outside it, figures embedded."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from megatron_mopd.report_page.content import Drawing, Heading, Section
from megatron_mopd.report_page.sources import Sources
from megatron_mopd.report_page.tables import Cell, Table

_CSS = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #222; font: 17px/1.5 Charter, "Bitstream Charter", Cambria, Georgia, serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; font-weight: 600; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid #ddd; font-weight: 600; }
h3 { font-size: 1.02rem; margin: 1.75rem 0 .5rem; font-weight: 600; color: #444; }
p { margin: .5rem 0; max-width: 46rem; }
nav { margin: 1rem 0 0; font-size: .88rem; line-height: 1.9; }
nav a { color: #0b5394; text-decoration: none; margin-right: 1.1rem; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
nav a.empty { color: #767676; }
.lead { color: #333; }
.sources { color: #666; font-size: .88rem; }
.missing { color: #666; font-style: italic; }
figure { margin: 1.25rem 0 1.5rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .86rem; line-height: 1.4; color: #444; }
figcaption { margin: .5rem 0 0; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { margin: 0 0 1.75rem; border-collapse: collapse; font-size: .88rem; line-height: 1.3;
  font-variant-numeric: tabular-nums lining-nums;
  border-top: 1.5px solid #222; border-bottom: 1.5px solid #222; }
.caption { font-size: .86rem; line-height: 1.4; color: #444; margin: 1.5rem 0 .5rem; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; position: sticky; left: 0;
  background: #fff; }
thead th { font-weight: 600; }
thead tr:last-child th { border-bottom: 1px solid #222; }
thead th.group { text-align: center; font-weight: 400; color: #444; padding-bottom: .1rem; }
thead th.group span { display: block; border-bottom: 1px solid #999; padding-bottom: .15rem; }
tr.rule td { border-top: 1px solid #bbb; }
td.first, th.first { padding-left: 1.6rem; }
td small { display: block; color: #6a6a6a; font-size: .78em; }
code { font-size: .92em; }
footer { margin-top: 3rem; color: #767676; font-size: .82rem; border-top: 1px solid #ddd; padding-top: .75rem; }
@media (max-width: 40rem) { body { font-size: 16px; } main { padding: 1.5rem .9rem 3rem; }
  th, td { padding: .25rem .45rem; } }
@media print { nav { display: none; } main { max-width: none; } figure, tr { break-inside: avoid; } }
"""
_CSS_PER_INCH, _CSS_LEAST = 130, 86
"""Pixels at which an inch of a figure is shown: its text is then as large as the page's captions, and at the least
still readable; a narrower screen scrolls."""


def as_html(sources: Sources, sections: Sequence[Section], lead: str, described: str) -> str:
    """The page. `lead` is its first sentence, `described` says what was read; both plain text."""
    links = "\n".join(_link(section) for section in sections)
    body = "\n".join(_section(section) for section in sections)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(sources.title)}</title>
<link rel="icon" href="data:,">
<style>
{_CSS}</style>
</head>
<body>
<main>
<h1>{escape(sources.title)}</h1>
{f'<p class="lead">{escape(lead)}</p>' if lead else ""}
<p class="sources">{_marked(described)}</p>
<nav>
{links}
</nav>
{body}
<footer>Written by <code>mopd report</code>. Every figure is also beside this page as PNG and PDF.</footer>
</main>
</body>
</html>
"""


def _link(section: Section) -> str:
    empty = "" if section.blocks else ' class="empty"'
    return f'<a href="#{section.name}"{empty}>{escape(section.title)}</a>'


def _section(section: Section) -> str:
    parts = [f'<section id="{section.name}">', f"<h2>{escape(section.title)}</h2>"]
    if not section.blocks:
        parts.append(f'<p class="missing">{_marked(section.missing)}</p>')
    for block in section.blocks:
        if isinstance(block, Heading):
            parts.append(f"<h3>{escape(block.text)}</h3>")
        elif isinstance(block, Drawing):
            parts.append(_figure(block))
        else:
            parts.append(_table(block))
    return "\n".join([*parts, "</section>"])


def _figure(drawing: Drawing) -> str:
    data = base64.b64encode(drawing.png).decode("ascii")
    return (
        f'<figure id="figure-{drawing.name}">\n'
        f'<div class="scroll"><img src="data:image/png;base64,{data}" alt="{escape(drawing.alt)}" style="max-width: '
        f'{drawing.inches * _CSS_PER_INCH:.0f}px; min-width: {min(drawing.inches * _CSS_LEAST, 600):.0f}px"></div>\n'
        f"<figcaption>{_marked(drawing.caption)}</figcaption>\n</figure>"
    )


def _table(table: Table) -> str:
    starts = _first_columns(table)
    head = []
    if table.groups:
        cells = "".join(
            f'<th class="group" colspan="{span}"><span>{escape(name)}</span></th>' for name, span in table.groups
        )
        head.append(f"<tr><th></th>{cells}</tr>")
    head.append("<tr>" + "".join(_head(name, at in starts) for at, name in enumerate(table.columns)) + "</tr>")
    rows = []
    for number, row in enumerate(table.rows):
        opened = '<tr class="rule">' if number in table.rules else "<tr>"
        rows.append(opened + "".join(_cell(cell, at in starts) for at, cell in enumerate(row)) + "</tr>")
    lines = ["<thead>", *head, "</thead>", "<tbody>", *rows, "</tbody>"]
    return (
        f'<p class="caption">{_marked(table.caption)}</p>\n<div class="scroll">\n<table>\n'
        + "\n".join(lines)
        + "\n</table>\n</div>"
    )


def _first_columns(table: Table) -> set[int]:
    """Where a group of columns begins, but for the first."""
    starts, at = set(), 1
    for _, span in table.groups:
        starts.add(at)
        at += span
    return starts - {1}


def _head(name: str, first: bool) -> str:
    return f'<th{_class(first)} scope="col">{escape(name)}</th>'


def _cell(cell: Cell, first: bool) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text)
    interval = f"<small>{escape(cell.interval)}</small>" if cell.interval else ""
    return f"<td{_class(first)}>{text}{interval}</td>"


def _class(first: bool) -> str:
    return ' class="first"' if first else ""


def _marked(text: str) -> str:
    """Plain text with `code`."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
