"""`mopd report`: the page, the Markdown and the files, from folders with chosen numbers."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from megatron_mopd import cli
from megatron_mopd.report_page.tables import NONE
from megatron_mopd.report_page.write import write_report
from megatron_mopd.yaml_config import ConfigError
from tests.unit.report_study import method, summary, write_metrics, write_study

FIGURES = ("scores", "accuracy", "scaling", "learning", "divergence", "share", "compute", "forgetting")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def report(study: Path) -> Path:
    page = write_report([study], study / "report")
    assert page == study / "report" / "report.html"
    return page.parent


class _Page(HTMLParser):
    """Tables as rows of text, sections, what is loaded and linked; every tag closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.used: dict[str, list[str]] = {"src": [], "href": []}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.words: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in self.used:
                self.used[name].append(value or "")
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "section":
            self.words[self.ids[-1]] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += (" " if "small" in self.open else "") + data
        if "section" in self.open:
            self.words[list(self.words)[-1]] += data


def _markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| :--")]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines]


SCORES = [
    ["TIES", "0.612 [0.590, 0.634]", "0.615 [0.581, 0.649]", "0.609 [0.571, 0.647]", NONE, NONE, NONE, NONE],
    [
        "Mix-RL",
        "0.734 [0.712, 0.756]",
        "0.737 [0.703, 0.771]",
        "0.731 [0.693, 0.769]",
        "0.882",
        "0.893",
        "0.908",
        "0.844",
    ],
    ["MOPD full", "0.956 [0.934, 0.978]", "0.959 [0.925, 0.993]", "0.953 [0.915, 0.991]", NONE, NONE, NONE, NONE],
    ["MOPD (policy gradient)", NONE, NONE, NONE, "0.937", "0.910", "0.954", "0.948"],
]
OTHERS = [
    ["base", "0.400 [0.209, 0.591]", "0.500 [0.490, 0.510]", "0.300 [0.280, 0.320]"],
    ["teacher adder", "0.605 [0.414, 0.796]", "0.900 [0.890, 0.910]", "0.310 [0.290, 0.330]"],
    ["MOPD full", "0.830 [0.640, 1.021]", "0.882 [0.872, 0.892]", "0.778 [0.758, 0.798]"],
    ["MOPD full", "0.981 [0.960, 1.000]", "0.872 [0.840, 0.900]"],
    ["MOPD sampled", NONE, "0.743 [0.700, 0.780]"],
    ["TIES", "0", "0", "0", "1.25"],
    ["MOPD full", "7.3k", "7.4k", "7.5k", "66"],
    ["training teacher sorter", "6k", "6.1k", "0", "44"],
    ["base", "20.20 [20.10, 20.30]", NONE, "0.120 [0.110, 0.130]"],
    # Seed by seed 20.956 / 20.1 and 21.956 / 20.3: mean 1.0621, half width 12.706 * 0.01949 = 0.248 (t of one degree).
    ["MOPD full", "21.46 [20.96, 21.96]", "1.062 [0.814, 1.310]", "0.110 [0.100, 0.120]"],
    ["model", "aime25"],
    ["base", "0.210 [0.200, 0.220]"],
    ["teacher sorter", NONE],
    ["MOPD full", "0.478 [0.428, 0.528]"],
    ["RL teacher of each domain", "54.79", "63.65", "78.40", "95.50", "51.20", "1.000"],
]


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_tables_have_the_numbers_of_the_summary(report: Path, name: str) -> None:
    text = (report / name).read_text(encoding="utf-8")
    rows = _Page(text).rows if name.endswith("html") else _markdown_rows(text)
    for row in (*SCORES, *OTHERS):
        assert row in rows


def test_the_best_of_a_column_is_bold_and_nothing_else(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    table = text[text.index("| method | mean (this study)") : text.index("Normalised score")]
    assert re.findall(r"\*\*(.*?)\*\*", table) == ["0.956", "0.959", "0.953"]


def test_headings_name_groups_and_domains(report: Path) -> None:
    page = _Page((report / "report.html").read_text(encoding="utf-8"))
    assert page.rows[:2] == [
        ["", "this study", "published"],
        ["method", "mean", "add", "sort", "mean", "Math", "IF", "SWE"],
    ]
    assert "2 domains, 2 teachers, 3 methods, 2 seeds" in (report / "report.md").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<iframe", re.sub(r"base64,[\w+/=]+", "", text), re.I)
    assert len(page.used["src"]) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.used["src"])
    assert all(target.startswith("#") or target == "data:," for target in page.used["href"])
    assert {target[1:] for target in page.used["href"] if target != "data:,"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "video", "audio", "svg"}


def test_every_figure_is_in_the_page_and_beside_it(report: Path) -> None:
    sources = _Page((report / "report.html").read_text(encoding="utf-8")).used["src"]
    embedded = [base64.b64decode(source.partition(",")[2]) for source in sources]
    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((.*?)\)", markdown) == [f"{name}.png" for name in FIGURES]
    for name, png in zip(FIGURES, embedded, strict=True):
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert (report / f"{name}.png").read_bytes() == png
        assert (report / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert {path.name for path in report.iterdir()} == {"report.html", "report.md"} | {
        f"{name}.{ending}" for name in FIGURES for ending in ("png", "pdf")
    }


def test_the_same_input_is_the_same_bytes_whatever_the_users_matplotlibrc(study: Path, report: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 50, "lines.linewidth": 9}):
        again = write_report([study], study / "again").parent
        assert matplotlib.rcParams["font.size"] == 30
    for path in report.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_alone_has_its_curves_and_says_what_is_missing(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run")
    out = write_report([tmp_path / "run"], tmp_path / "out").parent
    page = _Page((out / "report.html").read_text(encoding="utf-8"))
    missing = {name for name, words in page.words.items() if "No data: needs" in words}
    assert missing == {"scores", "accuracy", "benchmarks", "scaling", "compute", "forgetting"}
    assert "No data: needs a study with scaling." in page.words["scaling"]
    assert {path.stem for path in out.glob("*.png")} == {"learning", "divergence", "share"}
    assert "over generated tokens." in page.words["learning"]


def test_a_study_without_the_rest_says_so(tmp_path: Path) -> None:
    content = summary("Poor")
    content["scaling"] = None
    del content["base"]["benchmarks"]
    content["seeds"] = [0]
    content["methods"] = {"mopd": method("MOPD", "mopd", 0.9, {}, {})}
    content["methods"]["mopd"] |= {"perplexity": None, "out_of_domain": None, "benchmarks": None, "compute": None}
    content["methods"]["mopd"]["score"] = {"mean": None, "interval": None, "per_seed": {"0": None}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    out = write_report([tmp_path], tmp_path / "out").parent
    markdown = (out / "report.md").read_text(encoding="utf-8")
    for what in (
        "a study with `scaling`",
        "`evaluation.benchmarks`",
        "evaluations during training",
        "a run's metrics",
        "methods with their compute",
    ):
        assert f"*No data: needs {what}.*" in markdown
    assert f"| MOPD | {NONE} |" in markdown
    assert "One seed, so no intervals." in markdown
    assert {path.stem for path in out.glob("*.png")} == {"scores", "accuracy"}


def test_several_folders_are_told_apart(tmp_path: Path) -> None:
    content = summary("Other <b>study</b> | $x$")
    content["methods"] = {}
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling/summary.json").write_text(json.dumps(content))
    content = summary("First")
    content["scaling"] = content["methods"]["mopd"]["compute"] = None
    (tmp_path / "first").mkdir()
    (tmp_path / "first/summary.json").write_text(json.dumps(content))
    out = write_report([tmp_path / "first", tmp_path / "scaling"], tmp_path / "out").parent
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "<h3>First</h3>" in text
    assert "<h3>Other &lt;b&gt;study&lt;/b&gt; | $x$</h3>" in text
    names = {path.stem for path in out.glob("*.png")}
    assert names == {"scores-first", "accuracy-first", "compute-first", "forgetting-first", "scaling-other-b-study-b-x"}


def _broken(folder: Path, **changes: object) -> None:
    (folder / "summary.json").write_text(json.dumps(summary() | changes))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "RUN: no such folder; name a folder that"),
        (lambda folder: None, "RUN: no summary.json or metrics.jsonl in it; name a folder that"),
        (lambda folder: (folder / "summary.json").write_text("{"), "RUN/summary.json: not a readable JSON file"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "RUN/summary.json: top level: not a mapping"),
        (lambda folder: _broken(folder, version=2), "RUN/summary.json: version: not 1"),
        (lambda folder: _broken(folder, domains="add", methods=[]), "RUN/summary.json: methods: not a mapping"),
        (lambda folder: _broken(folder, domains={}), "RUN/summary.json: domains: not a list"),
        (lambda folder: _broken(folder, seeds=[0.5]), "RUN/summary.json: seeds.0: not a whole number"),
        (lambda folder: _broken(folder, title=3), "RUN/summary.json: title: not a string"),
        (lambda folder: _broken(folder, teachers={"t": {}}), "RUN/summary.json: teachers.t.domains: missing"),
        (
            lambda folder: _broken(folder, scaling=[{"teachers": 0}]),
            "RUN/summary.json: scaling.0.teachers: not a number",
        ),
        (
            lambda folder: _broken(folder, base={"domains": {"add": {"accuracy": {"mean": "high"}}}}),
            "RUN/summary.json: base.domains.add.accuracy.mean: not a number",
        ),
        (
            lambda folder: _broken(folder, base={"domains": {}, "perplexity": {"mean": 1, "interval": [2, 1]}}),
            "RUN/summary.json: base.perplexity.interval: not [low, high]",
        ),
        (lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"), "RUN/metrics.jsonl: not the metrics of a run"),
        (lambda folder: (folder / "metrics.jsonl").write_text("{\n"), "RUN/metrics.jsonl: not the metrics of a run"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], make: object, said: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    make(run)  # type: ignore[operator]
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("mopd: error: " + said.replace("RUN", str(run)))
    assert error.count("\n") == 1 and ";" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_twice_and_a_bad_out(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        write_report([study, study / "runs" / ".."], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file: File exists; name a folder"):
        write_report([study], tmp_path / "file")


def test_the_command_writes_into_the_first_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path / "a")
    write_metrics(tmp_path / "b", tokens=None)
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "a/report/report.html")
    text = (tmp_path / "a/report/report.md").read_text(encoding="utf-8")
    assert "over steps (not every run counted its tokens)" in text
    assert f"From `{tmp_path / 'a'}`, `{tmp_path / 'b'}`." in text
