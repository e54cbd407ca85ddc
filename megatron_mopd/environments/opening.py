"""Environments as a configuration wants them: found, checked, and shared by all domains that describe the same."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mopd.environments.chat import TurnFormat
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.http_environment import HttpEnvironment
from megatron_mopd.environments.protocol import Environment
from megatron_mopd.environments.python_tool import PythonTool
from megatron_mopd.environments.sandbox import Sandbox, SandboxError
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError


class Environments:
    """One environment for each distinct spec. Opens all of `specs` at once, so that nothing is missing later."""

    def __init__(self, specs: Iterable[EnvironmentSpec | None], tokenizer: Tokenizer) -> None:
        """Raises ConfigError."""
        distinct = dict.fromkeys(spec for spec in specs if spec is not None)
        self._opened = {spec: open_environment(spec, tokenizer) for spec in distinct}

    def find(self, spec: EnvironmentSpec) -> Environment:
        return self._opened[spec]


def open_environment(spec: EnvironmentSpec, tokenizer: Tokenizer) -> Environment:
    """Raises ConfigError, which names the key behind `environment.`, where it cannot work on this machine."""
    if spec.kind == "http":
        return HttpEnvironment(spec, tokenizer)
    try:
        sandbox = Sandbox.open(spec.isolation)
    except SandboxError as error:
        raise ConfigError(
            f"isolation: no sandbox works here ({error}); install bubblewrap or allow user namespaces, or, for code "
            "that you would run yourself, set isolation: none"
        ) from None
    return PythonTool(spec, tokenizer, sandbox)


def check_environment(key: str, spec: EnvironmentSpec | None, tokenizer: Tokenizer) -> None:
    """Raise ConfigError, before a run starts, for whatever of an environment would not work. key: domains.X."""
    if spec is None:
        return
    try:
        try:
            TurnFormat(tokenizer, spec.role)
        except ConfigError as error:
            raise ConfigError(f"role: {error}; name a role that it has, as user") from None
        environment = open_environment(spec, tokenizer)
        if isinstance(environment, HttpEnvironment):
            environment.check()
    except ConfigError as error:
        raise ConfigError(f"{key}.environment.{error}") from None
