"""`domains.X.environment`: what is accepted, and one line for each mistake, before any work starts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from megatron_mopd.config import RunConfig
from megatron_mopd.environments import opening
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.opening import Environments, check_environment
from megatron_mopd.environments.python_tool import PythonTool
from megatron_mopd.environments.sandbox import Sandbox, SandboxError
from megatron_mopd.yaml_config import ConfigError, build
from tests.environments.games import MODEL, TOKENIZER, python_spec

PYTHON, HTTP = {"kind": "python"}, {"kind": "http", "url": "http://localhost:8000"}


def tree(environment: object, **domain: object) -> dict:
    return {
        "run_dir": "unused",
        "stage": "rl",
        "steps": 1,
        "prompts_per_step": 1,
        "model": {"hf_config": str(MODEL)},
        "objective": {"kind": "grpo"},
        "rollout": {"samples_per_prompt": 2},
        "optim": {"lr": 1e-3},
        "domains": {"a": {"source": {"reasoning_gym": "chain_sum"}, "environment": environment} | domain},
    }


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "missing key 'domains.a.environment.kind'"),
        ({"kind": "bash"}, "domains.a.environment.kind: "),
        (PYTHON | {"max_turn": 3}, "unknown key 'domains.a.environment.max_turn'. Did you mean 'max_turns'?"),
        (PYTHON | {"max_turns": 0}, "domains.a.environment: max_turns: must be >= 1"),
        (PYTHON | {"turn_seconds": 0.0}, "domains.a.environment: turn_seconds: must be > 0"),
        (PYTHON | {"episode_seconds": -1.0}, "domains.a.environment: episode_seconds: must be > 0"),
        (PYTHON | {"workers": 0}, "domains.a.environment: workers: must be >= 1"),
        (PYTHON | {"max_result_tokens": 0}, "domains.a.environment: max_result_tokens: must be >= 1"),
        (PYTHON | {"role": ""}, "domains.a.environment: role: is empty; name a role"),
        (PYTHON | {"open": ""}, "domains.a.environment: open: is empty; give the text before a call"),
        (PYTHON | {"close": ""}, "domains.a.environment: close: is empty; give the text after a call"),
        (PYTHON | {"memory_mb": 8}, "domains.a.environment: memory_mb: must be >= 64, Python itself needs it, got 8"),
        (PYTHON | {"scratch_mb": 0}, "domains.a.environment: scratch_mb: must be >= 1"),
        (PYTHON | {"isolation": "docker"}, "domains.a.environment.isolation: "),
        (PYTHON | {"url": "http://h"}, "domains.a.environment: url: not used by an environment of kind 'python'"),
        (PYTHON | {"retries": 1}, "domains.a.environment: retries: not used by an environment of kind 'python'"),
        (HTTP | {"open": "["}, "domains.a.environment: open: not used by an environment of kind 'http'; remove it"),
        (HTTP | {"retries": -1}, "domains.a.environment: retries: must be >= 0"),
        ({"kind": "http"}, "domains.a.environment: url: missing; an environment of kind 'http' needs http://host:port"),
        (HTTP | {"url": "localhost:8000"}, "domains.a.environment: url: expected http://host:port"),
        (HTTP | {"url": "ftp://h"}, "domains.a.environment: url: expected http://host:port"),
        (HTTP | {"url": "http://h/?a=b"}, "domains.a.environment: url: expected http://host:port"),
        (HTTP | {"url": "http://h:99999"}, "domains.a.environment: url: the port in 'http://h:99999' is not a number"),
        (HTTP | {"url": "http://h/a b"}, "domains.a.environment: url: has a character that no URL has"),
        (HTTP | {"url": "http://h/é"}, "domains.a.environment: url: has a character that no URL has"),
        (HTTP | {"url": "http://me:pw@h"}, "domains.a.environment: url: has a user or password in it"),
    ],
)
def test_each_mistake_is_one_line_with_its_key(environment: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, tree(environment))
    told = str(caught.value)
    assert message in told and "\n" not in told
    assert "me:pw" not in told


def test_the_environments_reward_needs_one_that_gives_it() -> None:
    for environment in (None, PYTHON):
        with pytest.raises(ConfigError, match="verifier: 'environment' needs an environment of kind http"):
            build(RunConfig, tree(environment, verifier="environment"))
    assert build(RunConfig, tree(HTTP, verifier="environment")).domains["a"].verifier == "environment"


def test_only_where_the_student_answers() -> None:
    wrong = tree(PYTHON) | {"stage": "sft", "objective": {"kind": "cross_entropy"}, "rollout": {}}
    with pytest.raises(ConfigError, match=r"domains\.a\.environment: only where the student answers by itself"):
        build(RunConfig, wrong)


def test_a_role_that_the_template_refuses() -> None:
    with pytest.raises(
        ConfigError, match=r"^domains\.a\.environment\.role: .*unknown role tool.*; name a role"
    ) as caught:
        check_environment("domains.a", EnvironmentSpec(kind="python"), TOKENIZER)
    assert "\n" not in str(caught.value)


def test_no_sandbox_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(isolation: str) -> Sandbox:
        raise SandboxError("namespaces: Operation not permitted")

    monkeypatch.setattr(opening.Sandbox, "open", refuse)
    with pytest.raises(ConfigError) as caught:
        check_environment("domains.a", python_spec(), TOKENIZER)
    assert str(caught.value) == (
        "domains.a.environment.isolation: no sandbox works here (namespaces: Operation not permitted); install "
        "bubblewrap or allow user namespaces, or, for code that you would run yourself, set isolation: none"
    )


def test_domains_that_describe_the_same_share_it() -> None:
    one, same, other = python_spec(), python_spec(), python_spec(max_turns=2)
    environments = Environments([one, None, same, other], TOKENIZER)
    assert environments.find(one) is environments.find(same)
    assert environments.find(one) is not environments.find(other)
    assert isinstance(environments.find(one), PythonTool)


def test_the_documentation_names_every_key_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    for field in fields(EnvironmentSpec):
        assert f"`{field.name}`" in text, field.name
        if field.name not in ("kind", "url", "api_key_env"):
            assert f"| `{field.name}` | `{field.default}` |" in text, field.name
