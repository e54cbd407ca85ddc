"""The keys under `rollout.sglang`, the servers' command line, and what is found wrong before one is started."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.config import LaunchSpec, ObjectiveSpec, RolloutSpec, RunConfig, SglangSpec
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.method_config import check_method
from megatron_mopd.preflight import check_beforehand
from megatron_mopd.rollout.sglang import check as server_checks
from megatron_mopd.rollout.sglang.check import Wanted, check_server, check_servers, known_run_id, make_run_id
from megatron_mopd.rollout.sglang.http import ServerConnection, split_url
from megatron_mopd.rollout.sglang.server import (
    SGLANG_VERSION,
    ServedModel,
    check_environment,
    choose_ports,
    server_arguments,
    server_environment,
)
from megatron_mopd.run_identity import run_identity
from megatron_mopd.student.architecture import parse_architecture
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError, build, to_tree
from tests import tiny
from tests.comparison import MODEL
from tests.unit.sglang_stub import serving

ARCH = parse_architecture(tiny.MOE, "test")
SERVED = ServedModel(folder=Path("/models/x"), dtype="float32", context=40, routed_experts=True)


LAGGING: dict[str, Any] = {"engine": "sglang", "sglang": {"launch": {}}, "lag": 1}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"engine": "sglang"}, "sglang: missing; engine 'sglang' needs sglang.urls or sglang.launch"),
        ({"sglang": {"launch": {}}}, "sglang: not read by engine 'in_process'"),
        ({"engine": "sglang", "sglang": {}}, "sglang: give either urls or launch"),
        ({"engine": "sglang", "sglang": {"urls": ["http://a:1"], "launch": {}}}, "sglang: give either urls or launch"),
        ({"engine": "sglang", "sglang": {"urls": ["a:1"]}}, "urls: 'a:1': write it as http://host:port"),
        ({"engine": "sglang", "sglang": {"urls": ["http://a:1/v1"]}}, "write it as http://host:port"),
        ({"engine": "sglang", "sglang": {"urls": ["http://a:1", "http://a:1"]}}, "urls: the same one twice"),
        ({"engine": "sglang", "sglang": {"launch": {"servers": 0}}}, "launch: servers: must be >= 1"),
        ({"engine": "sglang", "sglang": {"launch": {"tensor": 2, "expert": 3}}}, "expert: must divide tensor"),
        ({"engine": "sglang", "sglang": {"launch": {"port": 65536}}}, "port: must be in 1..65535"),
        (
            {"engine": "sglang", "sglang": {"launch": {"arguments": ["--api-key=x"]}}},
            "arguments: --api-key is not taken; it is set from the other keys",
        ),
        ({"engine": "sglang", "sglang": {"launch": {"host": "0.0.0.0"}}}, "host: name one address, not every network"),
        ({"engine": "sglang", "sglang": {"launch": {}, "retries": -1}}, "retries: must be >= 0"),
        ({"engine": "sglang", "sglang": {"launch": {}, "api_key": "x"}}, "unknown key 'sglang.api_key'"),
        (
            {"routing_replay": "R3"},
            "routing_replay: R3 replays what servers report; engine 'in_process' reports nothing",
        ),
        ({"lag": -1}, "lag: must be >= 0 (0 is on-policy), got -1"),
        ({"lag": 1}, "lag: 1, but engine 'in_process' cannot sample while the ranks train; set engine: sglang, or lag"),
        (LAGGING | {"over_sample": 0.5}, "over_sample: must be in [1, 2], got 0.5"),
        (LAGGING | {"over_sample": 1.5}, "needs lag >= 2 (1 with partial: true), got 1; raise lag, or set it to 1"),
        (LAGGING | {"lag": 0, "over_sample": 1.5, "partial": True}, "needs lag >= 1, got 0; raise lag"),
        (LAGGING | {"partial": True}, "partial: nothing is left unfinished with over_sample 1; raise that, or remove"),
        (
            {"engine": "sglang", "sglang": {"launch": {}, "sync": {"in_flight": "wait"}}},
            "sglang.sync.in_flight: no answer is under way during an update with lag 0 or partial; remove it",
        ),
        (
            LAGGING | {"sglang": {"launch": {}, "sync": {"kind": "tensor", "colocated": True}}},
            "lag: 1, but servers on the trainer's devices (sglang.sync.colocated) cannot sample while it trains",
        ),
        ({"waves": 0}, "waves: must be >= 1, got 0"),
        ({"waves": 2}, "waves: 2, but engine 'in_process' has a step's answers all at once; set engine: sglang, or"),
        (LAGGING | {"lag": 2, "over_sample": 1.5, "waves": 2}, "waves: over_sample already ends a step with the"),
        (
            {"engine": "sglang", "waves": 2, "sglang": {"launch": {}, "sync": {"kind": "tensor", "colocated": True}}},
            "waves: servers on the trainer's devices (sglang.sync.colocated) cannot sample while the teachers score",
        ),
    ],
)
def test_a_wrong_key_is_named(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RolloutSpec, tree)
    assert message in str(caught.value)


def test_a_lag_goes_with_whole_steps_of_one_turn(tmp_path: Path) -> None:
    config = tiny.run_config(tmp_path, kind="grpo")
    lagging = replace(config.rollout, engine="sglang", sglang=SglangSpec(launch=LaunchSpec()), lag=1)
    assert replace(config, rollout=lagging).rollout.lag == 1
    with pytest.raises(ConfigError, match=r"^rollout\.lag: objective\.dynamic_sampling .* set lag: 0, or"):
        replace(config, rollout=lagging, objective=replace(config.objective, dynamic_sampling=True))
    domains = {name: replace(spec, environment=EnvironmentSpec(kind="python")) for name, spec in config.domains.items()}
    with pytest.raises(ConfigError, match=r"^rollout: domains\.a\.environment .* set lag to 0 and waves to 1$"):
        replace(config, rollout=lagging, domains=domains)


def test_waves_are_of_one_update_and_for_teachers(tmp_path: Path) -> None:
    config = tiny.run_config(tmp_path, kind="sampled")
    waves = replace(config.rollout, engine="sglang", sglang=SglangSpec(launch=LaunchSpec()), waves=2)
    assert replace(config, rollout=waves).rollout.samples_ahead
    with pytest.raises(ConfigError, match=r"^rollout\.waves: must be 1 with several optim\.updates_per_step$"):
        replace(config, rollout=waves, optim=replace(config.optim, updates_per_step=2))
    with pytest.raises(ConfigError, match=r"^rollout\.waves: more than prompts_per_step$"):
        replace(config, rollout=replace(waves, waves=config.prompts_per_step + 1))
    domains = {name: replace(spec, environment=EnvironmentSpec(kind="python")) for name, spec in config.domains.items()}
    with pytest.raises(ConfigError, match=r"^rollout: domains\.a\.environment .* and waves to 1$"):
        replace(config, rollout=waves, domains=domains)
    outcome = ObjectiveSpec(kind="sampled", outcome_weight=0.5, dynamic_sampling=True)
    with pytest.raises(ConfigError, match=r"^rollout\.waves: objective\.dynamic_sampling"):
        check_method("mopd", outcome, replace(waves, samples_per_prompt=2))
    with pytest.raises(ConfigError, match=r"^rollout\.waves: stage 'rl' has no teachers"):
        check_method("rl", ObjectiveSpec(kind="grpo"), replace(waves, samples_per_prompt=2))


def test_how_far_ahead_a_resumed_run_samples_may_change(tmp_path: Path) -> None:
    tokenizer, config = Tokenizer.load(MODEL), tiny.run_config(tmp_path)
    a = replace(config, rollout=RolloutSpec(engine="sglang", sglang=SglangSpec(launch=LaunchSpec())))
    b = replace(a, rollout=replace(a.rollout, lag=2, over_sample=1.5))
    assert run_identity(a, tokenizer) == run_identity(b, tokenizer)
    assert run_identity(a, tokenizer) == run_identity(replace(a, rollout=replace(a.rollout, waves=2)), tokenizer)


def test_sft_samples_nothing() -> None:
    rollout = RolloutSpec(engine="sglang", sglang=SglangSpec(launch=LaunchSpec()))
    with pytest.raises(ConfigError, match=r"rollout\.engine: stage 'sft'"):
        check_method("sft", ObjectiveSpec(kind="cross_entropy"), rollout)


def test_the_servers_of_a_resumed_run_may_be_others(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(MODEL)
    config = tiny.run_config(tmp_path)
    a = replace(config, rollout=RolloutSpec(engine="sglang", sglang=SglangSpec(urls=("http://a:1",))))
    b = replace(config, rollout=RolloutSpec(engine="sglang", sglang=SglangSpec(launch=LaunchSpec(servers=4))))
    assert run_identity(a, tokenizer) == run_identity(b, tokenizer) != run_identity(config, tokenizer)


def test_arguments_on_gpus() -> None:
    spec = LaunchSpec(servers=2, tensor=4, expert=2, first_gpu=1, arguments=("--mem-fraction-static", "0.8"))
    arguments = server_arguments(spec, SERVED, index=1, port=3000, device="cuda")
    pairs = dict(pairwise(arguments))
    assert pairs["--model-path"] == "/models/x"
    assert (pairs["--tp-size"], pairs["--ep-size"], pairs["--base-gpu-id"]) == ("4", "2", "5")
    assert (pairs["--host"], pairs["--port"], pairs["--dtype"]) == ("127.0.0.1", "3000", "float32")
    assert pairs["--load-format"] == "dummy"
    assert {"--enable-return-routed-experts", "--enable-deterministic-inference"} <= set(arguments)
    assert arguments[-2:] == ["--mem-fraction-static", "0.8"]
    assert not any("key" in argument for argument in arguments)
    assert "--attention-backend" not in arguments
    assert "--enable-memory-saver" not in arguments
    colocated = server_arguments(spec, replace(SERVED, colocated=True), index=1, port=3000, device="cuda")
    assert "--enable-memory-saver" in colocated  # or SGLang could not give its memory back


def test_arguments_and_environment_on_a_cpu() -> None:
    arguments = server_arguments(LaunchSpec(), replace(SERVED, routed_experts=False), index=0, port=1, device="cpu")
    pairs = dict(pairwise(arguments))
    assert (pairs["--attention-backend"], pairs["--sampling-backend"]) == ("torch_native", "pytorch")
    assert pairs["--max-total-tokens"] == str(64 * 40)
    assert "--enable-return-routed-experts" not in arguments
    assert "--base-gpu-id" not in arguments

    inherited = {"PATH": "/bin", "PYTHONPATH": "/repo", "RANK": "0", "MASTER_PORT": "5", "OMP_NUM_THREADS": "9"}
    inherited["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the server's ranks would wait for a store of ours
    environment = server_environment("cpu", 2, inherited)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["SGLANG_PLATFORM"] == "torch_cpu"
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    assert not {"PYTHONPATH", "RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & set(environment)
    assert server_environment("cuda", 2, inherited) == {"PATH": "/bin", "OMP_NUM_THREADS": "9"}


def fake_python(path: Path, answer: str) -> str:
    path.write_text(f"#!{sys.executable}\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def test_an_environment_without_the_right_sglang_is_refused(tmp_path: Path) -> None:
    right = fake_python(tmp_path / "right", f"print('{SGLANG_VERSION}')")
    check_environment(right)
    for python, message in (
        (str(tmp_path / "none"), "is not there or cannot be run; run `make sglang`"),
        (fake_python(tmp_path / "old", "print('0.4.9')"), f"has SGLang 0.4.9, this program needs {SGLANG_VERSION}"),
        (fake_python(tmp_path / "bare", "raise SystemExit(1)"), "has no SGLang; run `make sglang`"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_environment(python)
        assert str(caught.value).startswith("rollout.sglang.launch.python: ")
        assert message in str(caught.value)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"rollout\.sglang\.launch\.port: {port} cannot be listened on: Address"):
            choose_ports(LaunchSpec(port=port))
        with pytest.raises(ConfigError, match=r"rollout\.sglang\.launch\.host: 203\.0\.113\.1 cannot be listened on"):
            choose_ports(LaunchSpec(host="203.0.113.1"))
    assert len(set(choose_ports(LaunchSpec(servers=5)))) == 5


def test_more_gpus_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_checks, "gpu_count", lambda: 4)
    python = fake_python(tmp_path / "right", f"print('{SGLANG_VERSION}')")
    for launch, fits in (
        (LaunchSpec(python=python, servers=2, tensor=2), True),
        (LaunchSpec(python=python, servers=2, tensor=2, first_gpu=1), False),
        (LaunchSpec(python=python, servers=9, device="cpu"), True),
    ):
        config = sglang_run(tmp_path, SglangSpec(launch=launch))
        if fits:
            check_servers(config, ARCH)
        else:
            with pytest.raises(ConfigError, match="need 5 GPUs, this machine shows 4"):
                check_servers(config, ARCH)


def sglang_run(folder: Path, spec: SglangSpec, routing_replay: Any = "off") -> RunConfig:
    rollout = RolloutSpec(engine="sglang", sglang=spec, routing_replay=routing_replay)
    return replace(tiny.run_config(folder), rollout=rollout)


def test_routing_replay_needs_experts(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "student", tiny.DENSE)
    with_servers = sglang_run(tmp_path, SglangSpec(launch=LaunchSpec()), "R3")
    without = replace(with_servers, rollout=RolloutSpec(routing_replay="R2"))
    for config, mode in ((with_servers, "R3"), (without, "R2")):
        with pytest.raises(ConfigError, match=rf"^rollout\.routing_replay: {mode}, but the student's model has no exp"):
            check_beforehand(config, tmp_path / "student", 1)


MODEL_INFO = {"model_type": "qwen3_moe", "weight_version": "default"}
SERVER_INFO = {
    "version": SGLANG_VERSION,
    "dtype": "float32",
    "enable_deterministic_inference": True,
    "enable_return_routed_experts": True,
    "context_length": None,
    "model_path": "/nowhere",
}
WANTED = Wanted(arch=ARCH, dtype="float32", context=40, routed_experts=True, run_id="mine")


@pytest.mark.parametrize(
    ("model", "info", "vocabulary", "message"),
    [
        ({}, {}, 101, None),
        ({"weight_version": "mine:12"}, {}, 101, None),
        ({"weight_version": "other:12"}, {}, 101, "has the weights 'other:12' of another run"),
        ({"weight_version": "7"}, {}, 101, "has the weights '7' of another run"),
        ({"model_type": "llama"}, {}, 101, "serves a llama model, the student is qwen3_moe"),
        ({}, {"model_path": str(MODEL)}, 101, "with vocab_size 114, the student has 101"),
        ({}, {"version": "0.4.1"}, 101, f"runs SGLang 0.4.1, this program needs {SGLANG_VERSION}"),
        ({}, {"dtype": "bfloat16"}, 101, "has dtype bfloat16, the student float32; start it with --dtype float32"),
        ({}, {"enable_deterministic_inference": False}, 101, "start it with --enable-deterministic-inference"),
        ({}, {"enable_return_routed_experts": False}, 101, "R3 needs; start it with --enable-return-routed-experts"),
        ({}, {"context_length": 39}, 101, "has --context-length 39, prompts and responses take up to 40"),
        ({}, {}, 128, "has a vocabulary of 128 tokens, the student 101"),
    ],
)
def test_a_server_that_does_not_fit_is_named_with_the_remedy(
    model: dict[str, Any], info: dict[str, Any], vocabulary: int, message: str | None
) -> None:
    def reply(path: str, body: Any) -> tuple[int, Any]:
        if path == "/generate":
            return 400, {"error": {"message": f"out-of-vocabulary token id 9; valid range is [0, {vocabulary})."}}
        return 200, (MODEL_INFO | model if path == "/model_info" else SERVER_INFO | info)

    with serving(reply) as server:
        connection = ServerConnection(url=server.url)
        if message is None:
            check_server(connection, WANTED)
            return
        with pytest.raises(ConfigError) as caught:
            check_server(connection, WANTED)
    assert str(caught.value).startswith(f"rollout.sglang: {server.url}: ")
    assert message in str(caught.value)


def test_something_else_at_the_url_and_nothing_at_all() -> None:
    greeting = serving(lambda path, body: (200, {"hello": "world"}))
    with greeting as server, pytest.raises(ConfigError, match="is no SGLang server"):
        check_server(ServerConnection(url=server.url), WANTED)
    with pytest.raises(ConfigError, match="start the server, or correct") as caught:
        check_server(ServerConnection(url=server.url), WANTED)
    assert server.url in str(caught.value)


def test_a_run_keeps_its_identity_and_no_two_share_one(tmp_path: Path) -> None:
    assert known_run_id(tmp_path / "a") is None
    first = make_run_id(tmp_path / "a")
    assert make_run_id(tmp_path / "a") == known_run_id(tmp_path / "a") == first
    assert make_run_id(tmp_path / "b") != first


def test_a_url_is_taken_apart() -> None:
    place = split_url("http://host:30000")
    assert (place.host, place.port, place.path) == ("host", 30000, "")
    for wrong in ("host:30000", "https://host", "http://", "http://u:p@host"):
        with pytest.raises(ValueError, match="write it as http://host:port"):
            split_url(wrong)


def test_the_specification_survives_the_runs_file(tmp_path: Path) -> None:
    config = sglang_run(tmp_path, SglangSpec(launch=LaunchSpec(servers=2, arguments=("--log-level", "debug"))), "R3")
    assert build(RunConfig, to_tree(config)) == config
