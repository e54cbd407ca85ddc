"""The paper's benchmarks as this program's prompt files: `mopd benchmark NAME --from FILE --out FILE`.

Their data is not ours to ship: it comes from a local .jsonl, .json or .parquet file, or through the package
`datasets`. The result is an ordinary JSONL file for a domain's `source`, with what its verifier needs in each line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.domains.ifeval import read_instructions
from megatron_mopd.yaml_config import ConfigError, read_text

HUB = "hub:"
"""Marks the name of a data set on the Hugging Face Hub: hub:OWNER/NAME or hub:OWNER/NAME:SPLIT."""

SWE_BENCH_PROMPT = """\
Resolve this issue of the repository {repo} at commit {base_commit}. Answer with one patch that `git apply` takes, \
as a unified diff in a ```diff block.

{problem_statement}"""
"""The issue alone: a model that is to look into the repository needs an agent around it."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How rows of the published data become lines, and what scores the answers."""

    convert: Callable[[Row, str], dict[str, Any]]
    """(row, where it stands) -> line. Raises ConfigError."""
    verifier: str


def convert(name: str, origin: str, out: Path) -> int:
    """Write the lines of benchmark `name` from `origin` to `out`; returns how many.

    Raises ConfigError for an unknown name, an unreadable origin, a row that lacks something, or an existing `out`.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark '{name}': unknown; known: {', '.join(BENCHMARKS)}")
    if out.exists():
        raise ConfigError(f"--out {out}: exists; remove it or name another file")
    rows = _read_rows(origin)
    if not rows:
        raise ConfigError(f"--from {origin}: holds no row")
    lines = [BENCHMARKS[name].convert(row, f"{origin}: row {number}") for number, row in enumerate(rows, start=1)]
    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    return len(lines)


def _read_rows(origin: str) -> list[Row]:
    if origin.startswith(HUB):
        rows = _read_hub(origin.removeprefix(HUB))
    elif origin.endswith(".parquet"):
        rows = _read_parquet(Path(origin))
    elif origin.endswith(".json"):
        rows = _parse(read_text(origin, "--from"), origin)
    elif origin.endswith(".jsonl"):
        lines = read_text(origin, "--from").split("\n")  # not splitlines: JSON may hold U+2028 as it is
        rows = [_parse(line, f"{origin}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    else:
        raise ConfigError(f"--from {origin}: give a .jsonl, .json or .parquet file, or hub:OWNER/NAME:SPLIT")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"--from {origin}: expected a list of JSON objects, one per question")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"--from {path}: needs pyarrow; `pip install pyarrow`, or convert to .jsonl") from None
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"--from {path}: not a parquet file that can be read: {error}") from None
    return rows


def _read_hub(name: str) -> list[Row]:
    dataset, _, split = name.partition(":")
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"--from hub:{name}: needs the package datasets; `pip install datasets`, or give a file"
        ) from None
    try:
        return [dict(row) for row in datasets.load_dataset(dataset, split=split or "test")]
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--from hub:{name}: {error}") from None


def _aime(row: Row, where: str) -> dict[str, Any]:
    problem = _text(row, ("problem", "question"), where)
    answer = row.get("answer")
    text = str(answer).strip()
    if isinstance(answer, bool) or not text.isascii() or not text.isdigit() or int(text) > 999:
        raise ConfigError(f'{where}: "answer" of AIME must be a whole number from 0 to 999, got {answer!r}')
    return {"prompt": problem, "answer": str(int(text))}


def _ifeval(row: Row, where: str) -> dict[str, Any]:
    line = _ifbench(row, where)
    read_instructions(line, where)
    return line


def _ifbench(row: Row, where: str) -> dict[str, Any]:
    prompt = _text(row, ("prompt",), where)
    kinds, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(kinds, list) or not isinstance(arguments, list) or not len(kinds) == len(arguments) > 0:
        raise ConfigError(f'{where}: "instruction_id_list" and "kwargs" must be lists of one length, at least 1')
    for entry in arguments:
        if entry is not None and not isinstance(entry, dict):
            raise ConfigError(f'{where}: "kwargs" must hold mappings, one per instruction, got {entry!r}')
    # The published files pad kwargs with null, parquet with every name that any row uses.
    given = [{name: value for name, value in (entry or {}).items() if value is not None} for entry in arguments]
    return {"prompt": prompt, "instruction_id_list": list(kinds), "kwargs": given}


def _swe_bench(row: Row, where: str) -> dict[str, Any]:
    names = ("instance_id", "repo", "base_commit", "problem_statement", "patch")
    values = {name: _text(row, (name,), where) for name in names}
    return {
        "prompt": SWE_BENCH_PROMPT.format_map(values),
        "answer": values["patch"],
        **{name: values[name] for name in ("instance_id", "repo", "base_commit")},
    }


def _text(row: Row, names: tuple[str, ...], where: str) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise ConfigError(f"{where}: needs a non-empty text {' or '.join(map(repr, names))}; it has {', '.join(row)}")


BENCHMARKS: dict[str, Benchmark] = {
    "aime25": Benchmark(_aime, "math"),
    "aime26": Benchmark(_aime, "math"),
    "ifeval": Benchmark(_ifeval, "ifeval"),
    "ifbench": Benchmark(_ifbench, "command"),
    "swe_bench_verified": Benchmark(_swe_bench, "command"),
}
