"""The report as Markdown, with the figures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mopd.report_page.content import Drawing, Heading, Section
from megatron_mopd.report_page.sources import Sources
from megatron_mopd.report_page.tables import Cell, Table


def as_markdown(sources: Sources, sections: Sequence[Section], lead: str, described: str) -> str:
    """GitHub's Markdown. `lead` and `described` as for the page."""
    parts = [f"# {sources.title}", *([lead] if lead else []), described]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_block(block) for block in section.blocks] or [f"*{section.missing}*"]
    return "\n\n".join(parts) + "\n"


def _block(block: Table | Drawing | Heading) -> str:
    if isinstance(block, Heading):
        return f"### {block.text}"
    if isinstance(block, Drawing):
        return f"![{_plain(block.alt)}]({block.name}.png)\n\n*{block.caption}*"
    return f"{_table(block)}\n\n*{block.caption}*"


def _table(table: Table) -> str:
    # Markdown has no headings over several columns: the group's name goes into each.
    groups = ["", *(name for name, span in table.groups for _ in range(span))]
    columns = [
        _plain(f"{column} ({group})" if group and len(table.groups) > 1 else column)
        for column, group in zip(table.columns, groups + [""] * (len(table.columns) - len(groups)), strict=True)
    ]
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(cell: Cell) -> str:
    text = _plain(cell.text)
    return (f"**{text}**" if cell.strong else text) + (f" {cell.interval}" if cell.interval else "")


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
