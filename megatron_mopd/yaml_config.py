"""Strict YAML -> frozen dataclasses. Every error is a `ConfigError` that names the file and the key path.

Closes three traps of PyYAML: `1e-6` (no dot) loads as a string, the last of two equal keys wins without a
word, and `no`/`on` become booleans where a string is meant. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

REST = {"rest": True}
"""Metadata of a `dict[str, Any]` field that takes all keys which no other field of its class takes."""


class ConfigError(ValueError):
    """The user's configuration, data or checkpoint cannot be used; the message says where and what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class _StrictLoader(yaml.SafeLoader):
    pass


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a plain word")
        if key_node.value in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key_node.value}' appears twice; keep one")
        seen.add(key_node.value)
    # A key is always a string here: `no: ...` is the key 'no', not False.
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.2: only true/false are booleans, and 1e-6 is a number.
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that the loader above would take for numbers."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse one YAML document that must be a mapping. `origin` is named in errors."""
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a mapping of keys at the top level, got {type(tree).__name__}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `tree` with `key.path=value` set for each override; the value is parsed as YAML."""
    result = _copy(tree)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override '{override}': write it as key.path=value, for example optim.lr=1e-4")
        value = load_yaml(f"value: {text or 'null'}", f"override '{override}'")["value"]
        node, keys = result, path.split(".")
        for depth, key in enumerate(keys[:-1]):
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override '{override}': '{'.'.join(keys[: depth + 1])}' is a value, not a group")
            node = child
        node[keys[-1]] = value
    return result


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, list) else tree


def build[T](cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from a mapping; unknown, missing and mistyped keys are errors."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    rest = next((name for name, field in fields.items() if field.metadata.get("rest")), None)
    known = [name for name in fields if name != rest]
    arguments: dict[str, Any] = {}
    for key, value in tree.items():
        if key in known:
            arguments[key] = _convert(value, hints[key], _join(path, key))
        elif rest is not None:
            arguments.setdefault(rest, {})[key] = value
        else:
            raise ConfigError(_unknown_key(_join(path, key), key, known))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ConfigError(f"missing key '{_join(path, name)}'")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _unknown_key(path: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Known keys: {', '.join(known)}."
    return f"unknown key '{path}'. {hint}"


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [argument for argument in arguments if argument is not type(None)]
        return _convert(value, options[0], path)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ConfigError(f"{path}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return {key: _convert(item, arguments[1], _join(path, key)) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(item, arguments[0], f"{path}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a mapping of keys, got {value!r}")
        return build(typing.cast(type, hint), value, path)
    return _scalar(value, hint, path)


def _scalar(value: Any, hint: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


def to_tree(value: Any) -> Any:
    """The plain mapping that `build` turns back into `value`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = to_tree(getattr(value, field.name))
            tree.update(item) if field.metadata.get("rest") else tree.update({field.name: item})
        return tree
    if isinstance(value, dict):
        return {key: to_tree(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_tree(item) for item in value]
    return value


def dump_yaml(value: Any) -> str:
    return yaml.dump(to_tree(value), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def read_text(path: str | Path, what: str) -> str:
    """Read a text file or raise `ConfigError` naming it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
