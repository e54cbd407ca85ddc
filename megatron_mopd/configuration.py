"""docs/configuration.md, from the dataclasses that the YAML files are built into.

    python -m megatron_mopd.configuration            writes it
    python -m megatron_mopd.configuration --check    exit code 1 if it is not what would be written

The text after a field is its meaning, that of a class the text of its section. Imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mopd.config import RunConfig
from megatron_mopd.merge.config import MergeConfig
from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.reproduce.config import ReproduceConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
EXAMPLE = "configs/tiny/mopd.yaml"
COMMAND = "python -m megatron_mopd.configuration"


@dataclass(frozen=True, slots=True)
class File:
    """One kind of YAML file."""

    title: str
    text: str
    cls: type
    path: str = ""
    """Of the keys of `cls` in the file."""
    of: str = ""
    """Tells the titles of its sections from those of a run's."""


FILES = (
    File("A run", "For `mopd run`, `eval`, `export`, `sample` and `plan`.", RunConfig),
    File("A merge", "For `mopd merge`.", MergeConfig, of=" of a merge"),
    File("A comparison", "For `mopd reproduce`.", ReproduceConfig, of=" of a comparison"),
    File("A cluster", "For `mopd plan --cluster FILE`.", ClusterSpec, "cluster"),
)


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of one dataclass, and the places in the file where they stand."""

    cls: type
    paths: tuple[str, ...]
    of: str

    @property
    def title(self) -> str:
        return (f"`{self.paths[0]}`" if self.paths[0] else "Top level") + self.of


def page() -> str:
    """The whole of docs/configuration.md."""
    parts = [_head()]
    for file in FILES:
        parts.append(f"## {file.title}\n\n{file.text}")
        sections = _sections(file)
        places = {section.cls: section for section in sections}
        parts += [_render(section, places) for section in sections]
    return "\n\n".join(parts) + "\n"


def _head() -> str:
    example = (ROOT / EXAMPLE).read_text(encoding="utf-8").strip()
    return (
        textwrap.dedent(f"""\
        # Every key of every file

        Written by `{COMMAND}` from the dataclasses (`megatron_mopd/config.py` and those it imports): change the text
        there, not here. A test fails when this page is stale.

        One YAML file is one complete run. `key.path=value` on the command line sets one value, read as YAML:
        `mopd run FILE optim.lr=1e-6 rollout.samples_per_prompt=8`. Unknown, misspelt and duplicate keys are errors,
        and so are keys that nothing would read. The resolved file, every default filled in, is `config.yaml` in the
        run folder. Only `true` and `false` are booleans; `1e-6` is a number. A default of - means: must be given.

        The file of a small MOPD run, `{EXAMPLE}`:

        ```yaml
        """)
        + f"{example}\n```"
    )


def _sections(file: File) -> list[Section]:
    """The file's dataclasses in the order of their first place, each with all places."""
    found: dict[type, list[str]] = {}
    for cls, path in _walk(file.cls, file.path):
        found.setdefault(cls, []).append(path)
    return [Section(cls, tuple(paths), file.of) for cls, paths in found.items()]


def _walk(cls: type, path: str) -> Iterator[tuple[type, str]]:
    yield cls, path
    hints = typing.get_type_hints(cls)
    for field in _own_fields(cls):
        inner, many = _inner(hints[field.name])
        if inner is not None:
            yield from _walk(inner, ".".join(filter(None, (path, field.name, "NAME" if many else ""))))


def _own_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """Those that the class does not inherit from another dataclass."""
    inherited = {field.name for base in cls.__bases__ if dataclasses.is_dataclass(base) for field in
                 dataclasses.fields(base)}  # fmt: skip
    return [field for field in dataclasses.fields(cls) if field.name not in inherited]


def _inner(hint: Any) -> tuple[type | None, bool]:
    """The dataclass in a type, if there is one, and whether it is the value of a mapping."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and isinstance(arguments[1], type) and dataclasses.is_dataclass(arguments[1]):
        return arguments[1], True
    if origin in (types.UnionType, typing.Union):
        return next((_inner(each) for each in arguments if each is not type(None)), (None, False))
    return None, False


def _render(section: Section, places: dict[type, Section]) -> str:
    cls = section.cls
    text, meanings = descriptions(cls)
    lines = [f"### {section.title}", ""]
    if len(section.paths) > 1:
        lines += [f"Also at {', '.join(f'`{path}`' for path in section.paths[1:])}.", ""]
    bases = [places[base] for base in cls.__bases__ if base in places]
    lines += [f"All keys of {_link(base)}, and these." for base in bases] + [""] * len(bases)
    lines += [text, ""] if text else []
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    hints = typing.get_type_hints(cls)
    for field in _own_fields(cls):
        rest = field.metadata.get("rest")
        key = "any other key" if rest else f"`{field.name}`"
        shown = "any" if rest else _type(hints[field.name], places)
        default = "" if rest else _default(field)
        lines.append(f"| {key} | {shown} | {default} | {_cell(meanings.get(field.name, 'see there'))} |")
    return "\n".join(lines)


def descriptions(cls: type) -> tuple[str, dict[str, str]]:
    """The text of a dataclass, and field -> the text after it; only what has a section of its own needs none.

    Raises ValueError for another field without a text.
    """
    hints = typing.get_type_hints(cls)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    meanings: dict[str, str] = {}
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                meanings[name] = " ".join(str(following.value.value).split())
            elif _inner(hints[name])[0] is None:
                raise ValueError(f"{cls.__module__}.{cls.__name__}.{name}: no text after it says what it is")
    return ast.get_docstring(tree) or "", meanings


def _type(hint: Any, places: dict[type, Section]) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _link(places[typing.cast(type, hint)])
    if origin in (types.UnionType, typing.Union):
        return " or null".join(_type(each, places) if each is not type(None) else "" for each in arguments)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is dict:
        return f"mapping: name to {_type(arguments[1], places)}"
    if origin is tuple:
        return f"list of {_type(arguments[0], places)}"
    return {bool: "boolean", str: "text", int: "integer", float: "number"}[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "its defaults" if dataclasses.is_dataclass(field.default_factory) else "none"
    if field.default is dataclasses.MISSING:
        return "-"
    if field.default is None:
        return "`null`"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(map(str, field.default))}]`"
    return f"`{field.default}`"


def _link(section: Section) -> str:
    anchor = re.sub(r"[^a-z0-9_ -]", "", section.title.lower()).replace(" ", "-")
    return f"[{section.title}](#{anchor})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: list[str]) -> int:
    """Write the page, or with --check say whether it is current. Returns the exit code."""
    text = page()
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is stale; run `{COMMAND}`", file=sys.stderr)
        return 1
    if arguments:
        print(f"usage: {COMMAND} [--check]", file=sys.stderr)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
