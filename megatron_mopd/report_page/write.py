"""`mopd report RUN...`: reads the folders, draws, writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mopd.report_page.content import Drawing, sections
from megatron_mopd.report_page.html import as_html
from megatron_mopd.report_page.markdown import as_markdown
from megatron_mopd.report_page.sources import Sources, read_sources
from megatron_mopd.report_page.tables import headline
from megatron_mopd.yaml_config import ConfigError


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write report.html, report.md and every figure as PNG and PDF into `out`; returns the page's path.

    The same input gives the same bytes. Raises ConfigError before anything is written: see `read_sources`; and
    where `out` cannot be written.
    """
    sources = read_sources(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sections(sources)
        lead, described = _lead(sources), _described(sources, folders)
        for section in found:
            for block in section.blocks:
                if isinstance(block, Drawing):
                    (out / f"{block.name}.png").write_bytes(block.png)
                    (out / f"{block.name}.pdf").write_bytes(block.pdf)
        (out / "report.md").write_text(as_markdown(sources, found, lead, described), encoding="utf-8")
        page = out / "report.html"
        page.write_text(as_html(sources, found, lead, described), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; name a folder that can be written") from None
    return page


def _lead(sources: Sources) -> str:
    lines = [headline(study.methods) for study in sources.studies]
    return " ".join(line for line in lines if line)


def _described(sources: Sources, folders: Sequence[Path]) -> str:
    parts = [f"From {', '.join(f'`{folder}`' for folder in folders)}."]
    for study in sources.studies:
        counted = (
            (len(study.domains), "domain"),
            (len(study.teachers), "teacher"),
            (len(study.methods), "method"),
            (len(study.seeds), "seed"),
        )
        facts = [f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counted if count]
        parts.append(f"{study.title}: {', '.join(facts)}.")
    return " ".join(parts)
