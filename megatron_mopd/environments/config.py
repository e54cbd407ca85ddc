"""`domains.X.environment`: what answers the student between its turns. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal
from urllib.parse import urlsplit

from megatron_mopd.yaml_config import ConfigError, require

_PYTHON_KEYS = ("open", "close", "call", "memory_mb", "scratch_mb", "isolation")
_HTTP_KEYS = ("url", "api_key_env", "retries", "send")


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """Several turns instead of one. See docs/environments.md."""

    kind: Literal["python", "http"]
    """python: code that the student writes is run in a sandbox · http: an agent environment behind a URL."""
    max_turns: int = 8
    """Answers of the student in one episode, the last one among them."""
    turn_seconds: float = 10.0
    """Of all calls of one turn, or of one request with its retries, by the clock."""
    episode_seconds: float = 120.0
    """Of all calls of one episode together; the student's own time does not count."""
    workers: int = 8
    """Calls that one rank has under way at once."""
    role: str = "tool"
    """Whose messages the results are, in the chat template."""
    max_result_tokens: int = 1024
    """A longer result is cut at its end, and says so."""
    open: str = "<tool_call>"
    """`python`: text before a call; after the reasoning, where there is one."""
    close: str = "</tool_call>"
    """`python`: text after it."""
    call: Literal["json", "code"] = "json"
    """`python`: json: {"name": "python", "arguments": {"code": ...}} between the two · code: the code itself."""
    memory_mb: int = 1024
    """`python`: address space of a snippet."""
    scratch_mb: int = 64
    """`python`: files that a snippet may write, in memory."""
    isolation: Literal["auto", "bubblewrap", "namespaces", "landlock", "none"] = "auto"
    """`python`: auto: the strongest that works here · none: limits, but no isolation from files: only for code you
    would run yourself."""
    url: str | None = None
    """`http`: http(s)://host:port/path; /reset, /step and /close are put behind it."""
    api_key_env: str | None = None
    """`http`: the environment variable that holds the key, sent as a bearer token."""
    retries: int = 3
    """`http`: of one request, after connection faults and the codes 429, 502, 503 and 504."""
    send: Literal["text", "token_ids"] = "text"
    """`http`: what the environment gets to see of the student's turns."""

    def __post_init__(self) -> None:
        require(self.max_turns >= 1, "max_turns: must be >= 1")
        require(self.turn_seconds > 0, "turn_seconds: must be > 0")
        require(self.episode_seconds > 0, "episode_seconds: must be > 0")
        require(self.workers >= 1, "workers: must be >= 1")
        require(self.max_result_tokens >= 1, "max_result_tokens: must be >= 1")
        require(bool(self.role), "role: is empty; name a role of the chat template, as tool or user")
        unused = _HTTP_KEYS if self.kind == "python" else _PYTHON_KEYS
        for field in fields(self):
            if field.name in unused and getattr(self, field.name) != field.default:
                raise ConfigError(f"{field.name}: not used by an environment of kind '{self.kind}'; remove it")
        if self.kind == "python":
            self._check_python()
        else:
            self._check_http()

    def _check_python(self) -> None:
        require(bool(self.open), "open: is empty; give the text before a call")
        require(bool(self.close), "close: is empty; give the text after a call")
        require(self.memory_mb >= 64, f"memory_mb: must be >= 64, Python itself needs it, got {self.memory_mb}")
        require(self.scratch_mb >= 1, "scratch_mb: must be >= 1")

    def _check_http(self) -> None:
        if self.url is None:
            raise ConfigError("url: missing; an environment of kind 'http' needs http://host:port")
        if not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ConfigError("url: has a character that no URL has; write it as %XX")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"url: expected http://host:port or https://..., got '{self.url}'")
        if parts.username is not None or parts.password is not None:
            raise ConfigError("url: has a user or password in it; put the key into the variable api_key_env names")
        try:
            _ = parts.port
        except ValueError:
            raise ConfigError(f"url: the port in '{self.url}' is not a number up to 65535") from None
        require(self.retries >= 0, "retries: must be >= 0")
