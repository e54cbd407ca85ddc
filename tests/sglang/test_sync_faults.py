"""Weight sync when something fails, against real servers: half of an update never serves, and nothing is lost."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.buckets import Weights
from megatron_mopd.rollout.sync.push import SyncReport, sync_weights
from megatron_mopd.rollout.sync.tensor import TensorTransport
from megatron_mopd.rollout.sync.transport import Deliver
from megatron_mopd.yaml_config import ConfigError
from tests.distributed.ranks import RankError, run_ranks
from tests.sglang.sync_servers import ARCH, Servers
from tests.sglang.sync_student import SyncedStudent, generate, serves
from tests.sglang.sync_ways import BUCKET, TIMEOUT, Numbers, server_sync

pytest_plugins = ["tests.sglang.sync_servers"]


def _checksum(server: ServerConnection) -> dict[str, str]:
    ranks: list[dict[str, Any]] = server.post("/weights_checker", {"action": "checksum"})["ranks"]
    return ranks[0]["checksums"]


def _version(server: ServerConnection) -> str:
    version: str = server.get("/model_info")["weight_version"]
    return version


def _alone[R](function: Callable[..., R], *args: Any) -> R:
    """In a process of its own: the threads of a group, and limits on files, are no good in that of the tests."""
    return run_ranks(function, 1, *args, init=False, timeout=1200)[0]


def _healthy(pair: Servers, folder: Path, seed: int = 1) -> None:
    """Both servers serve, whatever the test before has left."""
    report = _alone(lambda: server_sync("tensor", folder, ARCH).push(Numbers(ARCH, seed), 0, pair.connections))
    assert report.synced == tuple(server.url for server in pair.connections)


class _Altered(TensorTransport):
    """Sends one number that is not the student's."""

    def stage(self, weights: Weights, num_updates: int) -> Deliver:
        def altered() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == "model.layers.1.mlp.gate.weight":
                    tensor = tensor.clone()
                    tensor[0, 0] += 1e-6
                yield name, tensor

        return super().stage(altered(), num_updates)


def test_other_weights_than_were_sent_never_serve(pair: Servers, tmp_path: Path) -> None:
    server = pair.connections[1]
    _healthy(pair, tmp_path)

    def push() -> tuple[SyncReport, bool, SyncReport, bool]:
        altered = _Altered(bucket_bytes=BUCKET, timeout=TIMEOUT)
        bad = server_sync("tensor", tmp_path, ARCH, altered).push(Numbers(ARCH, 2), 1, [server])
        served = serves(server, seconds=5)
        good = server_sync("tensor", tmp_path, ARCH).push(Numbers(ARCH, 2), 1, [server])
        return bad, served, good, serves(server)

    bad, served, good, serves_again = _alone(push)
    assert bad.failed == {
        server.url: "rank 0 holds another model.layers.1.mlp.gate.weight than was sent as version 'run-tensor:1'"
    }
    assert (bad.synced, served) == ((), False)
    assert (good.synced, serves_again) == ((server.url,), True)


class _Intruder(ServerConnection):
    """A server that somebody else gives another version right after us."""

    def post(self, path: str, body: Any, timeout: float | None = None) -> Any:
        answer = super().post(path, body, timeout)
        if path == "/end_weight_update":
            super().post("/update_weight_version", {"new_version": "other:7", "abort_all_requests": False})
        return answer


def test_a_wrong_version_neverserves(pair: Servers, tmp_path: Path) -> None:
    _healthy(pair, tmp_path)
    first, second = pair.connections
    intruded = _Intruder(url=second.url, api_key=second.api_key, timeout=second.timeout)
    report, served = _alone(
        lambda: (
            server_sync("tensor", tmp_path, ARCH).push(Numbers(ARCH, 3), 4, [first, intruded]),
            serves(second, seconds=5),
        )
    )
    assert report.synced == (first.url,)
    assert report.failed == {second.url: "has weight version 'other:7' after an update to 'run-tensor:4'"}
    assert not served


def _refused(kind: str, servers: list[ServerConnection], folder: Path) -> tuple[SyncReport, bool, SyncReport]:
    """A server whose session somebody ended refuses the next bucket; then an update without that."""
    student = SyncedStudent((1, 1, 1, 1), ARCH)
    sync = server_sync(kind, folder, ARCH)
    sync_weights(Numbers(ARCH, 4), 1, student.world, sync, servers)
    hook = Numbers(ARCH, 5, hook=lambda: servers[1].post("/end_weight_update", {}))
    report = sync_weights(hook, 2, student.world, sync, servers)
    served = serves(servers[1], seconds=5)
    again = sync_weights(Numbers(ARCH, 6), 3, student.world, sync, servers)
    sync.close()
    return report, served, again


@pytest.mark.parametrize("kind", ["tensor", "distributed"])
def test_a_server_that_refuses_half_way_does_not_serve_and_the_other_does(
    kind: str, pair: Servers, tmp_path: Path
) -> None:
    _healthy(pair, tmp_path)
    report, served, again = _alone(_refused, kind, pair.connections, tmp_path)
    first, second = (server.url for server in pair.connections)
    assert report.synced == (first,)
    assert "must run between begin_weight_update() and end_weight_update()" in report.failed[second]
    assert not served
    assert again.synced == (first, second)
    assert [_version(server) for server in pair.connections] == [f"run-{kind}:3"] * 2
    assert _checksum(pair.connections[0]) == _checksum(pair.connections[1])


def test_requests_under_way_wait_for_the_whole_update_and_carry_both_versions(pair: Servers, tmp_path: Path) -> None:
    _healthy(pair, tmp_path)
    server = pair.connections[0]

    def work() -> tuple[list[dict[str, Any]], list[bool]]:
        sync = server_sync("distributed", tmp_path, ARCH)
        sync.push(Numbers(ARCH, 7), 1, [server])
        answers: list[dict[str, Any]] = []
        request = threading.Thread(target=lambda: answers.extend(generate(server, [[1, 2, 3]] * 4, 200)))
        served_between: list[bool] = []

        def half_way() -> None:
            served_between.append(serves(server, seconds=4) or bool(answers))

        request.start()
        time.sleep(0.5)
        sync.push(Numbers(ARCH, 8, hook=half_way), 2, [server])
        request.join()
        sync.close()
        return answers, served_between

    answers, served_between = _alone(work)
    assert served_between == [False]
    for answer in answers:
        spans = answer["meta_info"]["weight_versions"]
        assert [span["version"] for span in spans] == ["run-distributed:1", "run-distributed:2"]
        assert (spans[0]["start"], spans[-1]["end"]) == (0, 200)
        assert spans[0]["end"] == spans[1]["start"]


def test_a_full_disk_is_one_line_and_the_servers_go_on_with_what_they_had(pair: Servers, tmp_path: Path) -> None:
    def work() -> tuple[str, list[bool], list[str]]:
        student = SyncedStudent((1, 1, 1, 1), ARCH)
        sync = server_sync("disk", tmp_path, ARCH)
        sync_weights(Numbers(ARCH, 9), 1, student.world, sync, pair.connections)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(ConfigError) as caught:
            sync_weights(Numbers(ARCH, 10), 2, student.world, sync, pair.connections)
        return str(caught.value), [serves(s) for s in pair.connections], [_version(s) for s in pair.connections]

    message, serving, versions = _alone(work)
    assert message == (
        f"{tmp_path / 'weights'}: cannot write the weights for the servers: File too large; make room, or change "
        "rollout.sglang.sync.folder or kind"
    )
    assert serving == [True, True]
    assert versions == ["run-disk:1"] * 2
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["update-00000001"]


def test_a_trainer_that_dies_half_way_leaves_servers_that_the_next_one_can_use(pair: Servers, tmp_path: Path) -> None:
    def dies() -> None:
        sync = server_sync("distributed", tmp_path, ARCH)
        sync.push(Numbers(ARCH, 11, hook=lambda: os.kill(os.getpid(), signal.SIGKILL)), 1, pair.connections)

    with pytest.raises(RankError, match="died without an answer"):
        _alone(dies)
    assert [serves(server, seconds=4) for server in pair.connections] == [False, False]
    report = _alone(lambda: server_sync("distributed", tmp_path, ARCH).push(Numbers(ARCH, 11), 1, pair.connections))
    assert report.synced == tuple(server.url for server in pair.connections)
    assert all(serves(server) for server in pair.connections)


def _killed(servers: list[ServerConnection], victim: int, folder: Path) -> tuple[SyncReport, str, bool]:
    """kill -9 of the second server, all of its processes, after the first buckets of an update."""
    student = SyncedStudent((1, 1, 1, 1), ARCH)
    sync = server_sync("distributed", folder, ARCH)
    sync_weights(Numbers(ARCH, 12), 1, student.world, sync, servers)
    weights = Numbers(ARCH, 13, hook=lambda: os.killpg(victim, signal.SIGKILL))
    report = sync_weights(weights, 2, student.world, sync, servers)
    sync.close()
    return report, _version(servers[0]), serves(servers[0])


def test_a_server_killed_half_way_costs_the_other_nothing_and_returns_with_the_right_weights(
    pair: Servers, tmp_path: Path
) -> None:
    _healthy(pair, tmp_path)
    first, second = pair.connections
    report, version, serves = _alone(_killed, pair.connections, pair.processes[1].process.pid, tmp_path)
    assert report.synced == (first.url,)
    assert second.url in report.failed
    assert (version, serves) == ("run-distributed:2", True)
    pair.restart(1)
    assert _version(second) == "default"

    def returns() -> tuple[SyncReport | None, SyncReport, SyncReport | None, Any, Any]:
        """Nothing to catch up from but the student; after one update of another kind there is."""
        none = server_sync("tensor", tmp_path, ARCH).catch_up(second)
        disk = server_sync("disk", tmp_path, ARCH)
        alone = disk.push(Numbers(ARCH, 14), 3, [first])
        caught_up = disk.catch_up(second)
        return none, alone, caught_up, _checksum(first), _checksum(second)

    none, alone, caught_up, of_first, of_second = _alone(returns)
    assert none is None
    assert alone.synced == (first.url,)
    assert caught_up is not None and caught_up.synced == (second.url,)
    assert of_first == of_second
    assert [_version(server) for server in pair.connections] == ["run-disk:3"] * 2
    report = _alone(lambda: server_sync("distributed", tmp_path, ARCH).push(Numbers(ARCH, 15), 4, pair.connections))
    assert report.synced == (first.url, second.url)
