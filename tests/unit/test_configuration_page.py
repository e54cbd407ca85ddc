"""docs/configuration.md: current, complete, and its links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_mopd import configuration
from megatron_mopd.config import OptimSpec, RunConfig
from megatron_mopd.data_config import BenchmarkSpec


def test_page_is_current() -> None:
    """`make docs` writes it."""
    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page()
    assert configuration.main(["--check"]) == 0


def test_check_fails_for_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(configuration, "ROOT", tmp_path)
    monkeypatch.setattr(configuration, "PAGE", page)
    monkeypatch.setattr(configuration, "page", lambda: "new\n")
    page.write_text("old\n")
    assert configuration.main(["--check"]) == 1
    assert capsys.readouterr().err == "configuration.md is stale; run `python -m megatron_mopd.configuration`\n"
    assert configuration.main([]) == 0
    assert (page.read_text(), configuration.main(["--check"])) == ("new\n", 0)
    assert configuration.main(["--chek"]) == 2


def test_every_key_is_a_row() -> None:
    sections = dict(re.findall(r"^### (.+)\n((?:(?!^##).*\n)*)", configuration.page(), flags=re.MULTILINE))
    rows = {title: re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) for title, text in sections.items()}
    assert rows["Top level"] == [field.name for field in dataclasses.fields(RunConfig)]
    assert rows["`optim`"] == [field.name for field in dataclasses.fields(OptimSpec)]
    # Inherited keys stand in the parent's section, which is linked.
    assert rows["`evaluation.out_of_domain.NAME`"] == list(BenchmarkSpec.__annotations__)
    assert {"`domains.NAME.environment`", "`rollout.sglang.sync`", "`objective.importance`"} <= set(rows)
    assert "Top level of a merge" in rows and "`methods.NAME` of a comparison" in rows and "`cluster`" in rows


def test_rows_say_type_default_and_meaning() -> None:
    page = configuration.page()
    for row in (
        "| `lr` | number | - | After the warm-up. |",
        "| `schedule` | `constant`, `linear`, `cosine` | `constant` | From `lr` after",
        "| `betas` | list of number | `[0.9, 0.999]` |",
        "| `teacher` | text or null | `null` | Key into `teachers`;",
        "| `teachers` | mapping: name to [`teachers.NAME`](#teachersname) | none | see there |",
        "| `freeze_router` | boolean | `false` |",
        "KL(p \\|\\| q)",
    ):
        assert row in page, row


def test_links_lead_to_headings() -> None:
    page = configuration.page()
    headings = re.findall(r"^#+ (.+)$", page.replace("\n# The student", ""), flags=re.MULTILINE)
    anchors = [re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\(#([^)]+)\)", page)) <= set(anchors)


def test_a_field_without_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Bare\.number: no text after it says what it is"):
        configuration.descriptions(Bare)


@dataclasses.dataclass
class Bare:
    number: int
