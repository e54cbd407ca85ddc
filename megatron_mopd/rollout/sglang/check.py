"""Whether a server is the one that a run needs: its release, model, vocabulary, dtype, options, and whose it is."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.config import LaunchSpec, RunConfig, SglangSpec
from megatron_mopd.environment import gpu_count
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError, ServerRefused
from megatron_mopd.rollout.sglang.server import SGLANG_VERSION, check_environment, choose_ports
from megatron_mopd.student.architecture import FAMILIES, Architecture, read_architecture
from megatron_mopd.yaml_config import ConfigError, read_text

NOBODY = "default"
"""SGLang's weight version of a server that was started and given no weights since."""
_NO_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run needs of its servers."""

    arch: Architecture
    dtype: str
    context: int
    """Tokens of the longest prompt and response."""
    routed_experts: bool
    run_id: str
    """Weights of this run may be on the server already: it was interrupted, and goes on."""


def wanted(config: RunConfig, arch: Architecture, run_id: str) -> Wanted:
    """What the run of `config` needs of its servers."""
    return Wanted(
        arch=arch,
        dtype=config.model.dtype,
        context=max(domain.max_prompt_tokens + domain.max_response_tokens for domain in config.domains.values()),
        routed_experts=config.rollout.routing_replay == "R3",
        run_id=run_id,
    )


def check_servers(config: RunConfig, arch: Architecture) -> None:
    """Raise ConfigError for what can be found wrong before a rank is started. Starts no server."""
    spec = config.rollout.sglang
    if spec is None:
        return
    if spec.launch is not None:
        check_environment(spec.launch.python)
        choose_ports(spec.launch)
        _check_gpus(spec.launch)
    needs = wanted(config, arch, known_run_id(Path(config.run_dir)) or "")
    for url in spec.urls:
        check_server(ServerConnection(url=url, api_key=api_key(spec)), needs)


def _check_gpus(spec: LaunchSpec) -> None:
    last, present = spec.first_gpu + spec.servers * spec.tensor, gpu_count()
    if (spec.device == "cuda" or (spec.device == "auto" and present)) and last > present:
        raise ConfigError(
            f"rollout.sglang.launch: {spec.servers} servers x tensor {spec.tensor} after first_gpu {spec.first_gpu} "
            f"need {last} GPUs, this machine shows {present}; start fewer, or set device: cpu"
        )


def api_key(spec: SglangSpec) -> str | None:
    """Of servers that run already; it is in no file of ours."""
    return os.environ.get(spec.api_key_variable) or None


def known_run_id(run_dir: Path) -> str | None:
    """What the weights of this folder's run are called on a server, None where it never ran."""
    path = run_dir / "run_id"
    return read_text(path, "run id").strip() if path.exists() else None


def make_run_id(run_dir: Path) -> str:
    """The same, made up where it never ran: random, so that two runs never take each other's weights for theirs."""
    known = known_run_id(run_dir)
    if known:
        return known
    made, path = secrets.token_hex(8), run_dir / "run_id"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(made + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir: {path} cannot be written: {error.strerror}; choose another folder") from None
    return made


def check_server(server: ServerConnection, wanted: Wanted) -> None:
    """Raise ConfigError, one line with the remedy, for a server that is not what the run needs."""
    try:
        model, info = server.get("/model_info"), server.get("/server_info")
    except ServerRefused as refused:
        raise ConfigError(f"rollout.sglang: {refusal(refused)}") from None
    except ServerError as error:
        raise ConfigError(f"rollout.sglang: {error}; start the server, or correct rollout.sglang.urls") from None
    problem = _problem(model, info, wanted) or _vocabulary_problem(server, wanted.arch)
    if problem:
        raise ConfigError(f"rollout.sglang: {server.url}: {problem}")


def refusal(refused: ServerRefused) -> str:
    """What a server's refusal to say who it is means."""
    if refused.status in (401, 403):
        return (
            f"{refused.url} refuses our API key, so it is somebody else's; use another server, or put its key into the "
            "variable that rollout.sglang.api_key_variable names"
        )
    return f"{refused}; is it an SGLang server?"


def _problem(model: Mapping[str, Any], info: Mapping[str, Any], wanted: Wanted) -> str | None:
    """What the server says about itself that does not fit."""
    if not isinstance(model, Mapping) or not isinstance(info, Mapping) or "version" not in info:
        return "is no SGLang server"
    version, dtype = info["version"], info.get("dtype")
    if version != SGLANG_VERSION:
        return f"runs SGLang {version}, this program needs {SGLANG_VERSION}; install that"
    owner, _, updates = str(model["weight_version"]).rpartition(":")
    if updates != NOBODY and owner != wanted.run_id:
        return (
            f"has the weights '{model['weight_version']}' of another run; use another server, or restart it if that "
            "run is over"
        )
    if dtype != wanted.dtype:
        return f"has dtype {dtype}, the student {wanted.dtype}; start it with --dtype {wanted.dtype}"
    if not info.get("enable_deterministic_inference"):
        return "ignores the seeds of requests; start it with --enable-deterministic-inference"
    if wanted.routed_experts and not info.get("enable_return_routed_experts"):
        return "returns no routed experts, which routing_replay R3 needs; start it with --enable-return-routed-experts"
    context = info.get("context_length")
    if context is not None and context < wanted.context:
        return f"has --context-length {context}, prompts and responses take up to {wanted.context}; raise it"
    return _architecture_problem(model, info, wanted.arch)


def _architecture_problem(model: Mapping[str, Any], info: Mapping[str, Any], arch: Architecture) -> str | None:
    """All of the shapes where the folder that the server was started with can be read from here, else its family."""
    if model.get("model_type") not in FAMILIES or model["model_type"] != arch.family:
        return f"serves a {model.get('model_type')} model, the student is {arch.family}; serve the student's own"
    folder = Path(str(info.get("model_path")))
    if not (folder / "config.json").is_file():
        return None
    served = read_architecture(folder)
    for name in Architecture.__dataclass_fields__:
        ours, theirs = getattr(arch, name), getattr(served, name)
        if name not in ("init_std", "max_positions") and ours != theirs:
            return f"serves {folder} with {name} {theirs}, the student has {ours}; serve the student's own model"
    return None


def _vocabulary_problem(server: ServerConnection, arch: Architecture) -> str | None:
    """A server that is asked about a token that does not exist says how many do."""
    body = {
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "token_ids_logprob": [_NO_TOKEN],
    }
    try:
        server.post("/generate", body)
    except ServerRefused as refused:
        found = re.search(r"valid range is \[0, (\d+)\)", refused.message)
        if found and int(found[1]) != arch.vocab_size:
            return (
                f"has a vocabulary of {found[1]} tokens, the student {arch.vocab_size}; serve the student's own model"
            )
    except ServerError as error:
        return error.reason
    return None
