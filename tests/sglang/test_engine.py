"""`SglangEngine` over two real servers of its own: what it returns, and what happens when they are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mopd.config import RunConfig
from megatron_mopd.rollout.engine import RolloutFailure, Sampling
from megatron_mopd.rollout.sglang.check import check_server, check_servers, wanted
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerRefused
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.types import Rollout
from megatron_mopd.yaml_config import ConfigError
from tests.distributed.ranks import run_ranks
from tests.sglang.conftest import ROOT
from tests.sglang.trainer_side import Trainer, prompts, response_logprobs, run_config, running, served_logprobs

SECONDS = 1500
PLAIN = Sampling(temperature=1.0)


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in rollouts]


def _promises(config: RunConfig) -> dict[str, Any]:
    """Everything that the contract of `RolloutEngine` says, measured on a healthy pair of servers."""
    trainer = Trainer(config)
    engine, asked = trainer.engine, prompts(64, 40)
    with pytest.raises(ValueError, match="no weights"):
        engine.generate(asked, samples=1, sampling=PLAIN, seed=0)
    trainer.send(0)
    found: dict[str, Any] = {"differences": {}, "routing": [], "tokens": {}}
    for version, (name, sampling) in enumerate(
        {
            "plain": PLAIN,
            "warm": Sampling(temperature=0.7),
            "cut": Sampling(temperature=1.3, top_p=0.9, top_k=20),
            "greedy": Sampling(temperature=0),
        }.items(),
        start=1,
    ):
        trainer.change()
        trainer.send(version)
        rollouts = engine.generate(asked, samples=1, sampling=sampling, seed=5)
        logits, routed = trainer.view(rollouts)
        expected = response_logprobs(rollouts, logits, sampling.temperature or 1.0)
        found["differences"][name] = float(np.abs(expected - served_logprobs(rollouts)).max())
        found["tokens"][name] = len(expected)
        for rollout, own in zip(rollouts, routed, strict=True):
            assert rollout.routed_experts is not None
            assert (rollout.routed_experts[-1] == -1).all()
            found["routing"].append(bool((np.sort(rollout.routed_experts[:-1], -1) == np.sort(own[:-1], -1)).all()))
        assert {rollout.policy_version for rollout in rollouts} == {version}
        if name == "greedy":
            found["argmax"] = all(
                (rows.argmax(-1).numpy() == rollout.response_ids).all()
                for rows, rollout in zip(logits, rollouts, strict=True)
            )
    several = engine.generate(asked[:8], samples=4, sampling=PLAIN, seed=5)
    backwards = engine.generate(asked[7::-1], samples=4, sampling=PLAIN, seed=5)
    found["several"] = [(r.prompt.id, r.sample) for r in several]
    found["tokens_several"], found["tokens_backwards"] = tokens(several), tokens(backwards)
    found["other_seed"] = tokens(engine.generate(asked[:8], samples=4, sampling=PLAIN, seed=6))
    stops = trainer.inputs.tokenizer.stop_ids
    found["reasons"] = [(r.finish_reason, int(r.response_ids[-1]) in stops, len(r.response_ids)) for r in several]
    found["processes"] = [_process_facts(member.process.process.pid) for member in engine._pool.members]
    found["strangers"] = [_strangers(config, member.connection) for member in engine._pool.members]
    found["keys"] = [member.connection.api_key for member in engine._pool.members]
    pids = [member.process.process.pid for member in engine._pool.members]
    trainer.close()
    found["after"] = [Path(f"/proc/{pid}").exists() for pid in pids]
    return found


def _process_facts(pid: int) -> tuple[str, str, str]:
    """(command line, working directory, environment) of a server."""
    folder = Path(f"/proc/{pid}")
    command, environment = (
        (folder / name).read_bytes().replace(b"\0", b" ").decode() for name in ("cmdline", "environ")
    )
    return command, os.readlink(folder / "cwd"), environment


def _strangers(config: RunConfig, connection: ServerConnection) -> list[str]:
    """What a run with another key is told, and what one with the key but another identity is."""
    assert config.model.checkpoint is not None
    arch = read_architecture(Path(config.model.checkpoint))
    fits = wanted(config, arch, Path(config.run_dir, "run_id").read_text().strip())
    check_server(connection, fits)
    told = []
    for server, needs in (
        (replace(connection, api_key="wrong"), fits),
        (connection, replace(fits, run_id="another")),
        (connection, replace(fits, dtype="bfloat16")),
        (connection, replace(fits, arch=replace(arch, vocab_size=115))),
        (connection, replace(fits, arch=replace(arch, num_layers=3))),
        (connection, replace(fits, arch=replace(arch, family="qwen3", num_experts=0))),
    ):
        try:
            check_server(server, needs)
            told.append("nothing")
        except ConfigError as error:
            told.append(str(error))
    with pytest.raises(ServerRefused) as refused:
        replace(connection, api_key=None).post("/generate", {"input_ids": [5]})
    assert refused.value.status == 401
    return told


def test_what_servers_return_is_what_the_student_says(models: Path, tmp_path: Path) -> None:
    config = run_config(models, tmp_path / "run", launch={"servers": 2}, sync={"kind": "disk"})
    (found,) = run_ranks(_promises, 1, config, init=False, timeout=SECONDS)

    print(found["differences"], found["tokens"])
    assert found["tokens"]["plain"] + found["tokens"]["warm"] >= 2000
    assert max(found["differences"].values()) < 1e-4
    assert all(found["routing"])
    assert found["argmax"]
    _check_seeds(found)
    _check_processes(found, tmp_path / "run")
    for told in found["strangers"]:
        for part, line in zip(
            (
                "refuses our API key",
                "of another run",
                "has dtype float32",
                "vocabulary|vocab_size",
                "num_layers",
                "qwen3_moe",
            ),
            told,
            strict=True,
        ):
            assert any(word in line for word in part.split("|")), line
            assert "\n" not in line


def _check_seeds(found: dict[str, Any]) -> None:
    assert found["several"] == [(f"a/{n}", sample) for n in range(8) for sample in range(4)]
    same = found["tokens_several"]
    by_prompt = [same[4 * n : 4 * n + 4] for n in range(8)]
    assert [row for group in reversed(by_prompt) for row in group] == found["tokens_backwards"]
    assert all(len({tuple(row) for row in group}) > 1 for group in by_prompt)
    assert found["other_seed"] != same
    assert all(stopped == (reason == "stop") for reason, stopped, _ in found["reasons"])
    assert all(length == 40 for reason, _, length in found["reasons"] if reason == "length")


def _check_processes(found: dict[str, Any], run_dir: Path) -> None:
    """Nothing of ours is on the servers' path, and their key is nowhere to be read."""
    for number, ((command, folder, environment), key) in enumerate(zip(found["processes"], found["keys"], strict=True)):
        log = (run_dir / "logs" / f"server{number}.log").read_text()
        line = next(line for line in log.splitlines() if line.startswith("serve: sys.path "))
        path = line.removeprefix("serve: sys.path ")
        assert f"'{ROOT}'" not in path
        assert "''" not in path
        assert all(str(ROOT) not in entry or ".venv-sglang" in entry for entry in path.split(","))
        assert not Path(folder).is_relative_to(ROOT)
        assert " -P " in command
        assert "PYTHONPATH" not in environment
        assert len(key) > 30
        for text in (command, environment, log):
            assert key not in text
    assert all(key not in path.read_text() for path in run_dir.glob("*") if path.is_file() for key in found["keys"])
    assert found["keys"][0] == found["keys"][1]
    assert found["after"] == [False, False]


def _killed(config: RunConfig) -> dict[str, Any]:
    trainer = Trainer(config)
    engine, asked = trainer.engine, prompts(48, 120)
    members = engine._pool.members
    trainer.send(1)
    calm = engine.generate(asked, samples=2, sampling=PLAIN, seed=9)

    victim = members[0].process.process.pid

    def kill_when_busy() -> None:
        while members[0].in_flight < 8:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill_when_busy)
    killer.start()
    rough = engine.generate(asked, samples=2, sampling=PLAIN, seed=9)
    killer.join()
    found = {
        "calm": [(r.prompt.id, r.sample, r.token_ids.tolist()) for r in calm],
        "rough": [(r.prompt.id, r.sample, r.token_ids.tolist()) for r in rough],
        "said": list(trainer.said),
        "live": [member.is_live for member in members],
    }
    trainer.change()
    trainer.send(2)  # while the server starts again
    found["meanwhile"] = {r.policy_version for r in engine.generate(asked[:4], samples=1, sampling=PLAIN, seed=1)}
    deadline = time.monotonic() + SECONDS / 2
    version = 3
    while not members[0].is_live and time.monotonic() < deadline:
        time.sleep(2)
        trainer.send(version)
        version += 1
    found["back"] = [member.connection.get("/model_info")["weight_version"] for member in members]
    found["expected"] = f"{(Path(config.run_dir) / 'run_id').read_text().strip()}:{version - 1}"
    after = engine.generate(asked, samples=1, sampling=PLAIN, seed=9)
    logits, _ = trainer.view(after)
    found["difference"] = float(np.abs(response_logprobs(after, logits, 1.0) - served_logprobs(after)).max())
    found["said"] = list(trainer.said)
    for member in members:
        os.kill(member.process.process.pid, signal.SIGKILL)
    with pytest.raises(RolloutFailure) as caught:
        engine.generate(asked[:4], samples=1, sampling=PLAIN, seed=1)
    found["lost"] = str(caught.value)
    trainer.close()
    return found


def test_a_killed_server_costs_nothing_and_comes_back_with_the_right_weights(models: Path, tmp_path: Path) -> None:
    config = run_config(models, tmp_path / "run", launch={"servers": 2}, sync={"kind": "disk"})
    (found,) = run_ranks(_killed, 1, config, init=False, timeout=SECONDS)

    assert len(found["calm"]) == 96
    assert found["rough"] == found["calm"]
    assert found["live"] == [False, True]
    assert found["meanwhile"] == {2}
    assert found["back"] == [found["expected"]] * 2
    assert found["difference"] < 1e-4
    assert len(found["said"]) == 2
    assert "is taken out: ended" in found["said"][0]
    assert "is back, with the current weights" in found["said"][1]
    assert "no server is left" in found["lost"]
    assert found["lost"].count("http://127.0.0.1:") == 2


def _two_ranks(config: RunConfig) -> list[tuple[str, int, list[int]]]:
    trainer = Trainer(config)
    trainer.send(4)
    own = prompts(11, 24)[trainer.world.rank :: trainer.world.size]
    rollouts = trainer.engine.generate(own, samples=2, sampling=PLAIN, seed=2)
    trainer.close()
    return [(r.prompt.id, r.sample, r.token_ids.tolist()) for r in rollouts]


def test_ranks_get_their_own_rollouts_and_the_number_of_ranks_does_not_matter(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one server that two runs find, one after the other: the first gives it back when it is done."""
    with running(models / "student", tmp_path, "of-this-test") as url:
        config = {name: run_config(models, tmp_path / name, urls=[url], sync={"kind": "disk"}) for name in "ab"}
        with pytest.raises(ConfigError, match="refuses our API key"):
            check_servers(config["a"], read_architecture(models / "student"))
        monkeypatch.setenv("MOPD_SGLANG_API_KEY", "of-this-test")
        check_servers(config["a"], read_architecture(models / "student"))
        (one,) = run_ranks(_two_ranks, 1, config["a"], init=False, timeout=SECONDS)
        first, second = run_ranks(_two_ranks, 2, config["b"], init=False, timeout=SECONDS)

    assert sorted(one) == sorted(first + second)
    assert [item[0] for item in second] == [f"a/{n}" for n in (1, 1, 3, 3, 5, 5, 7, 7, 9, 9)]
    with pytest.raises(ConfigError, match=r"start the server, or correct rollout\.sglang\.urls"):
        check_servers(config["a"], read_architecture(models / "student"))
