"""The student's weights on real servers after every step, each way of sending them: the same numbers on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.push import SyncReport, sync_weights
from megatron_mopd.student.weight_table import model_tensors
from tests.distributed.ranks import run_ranks
from tests.sglang.sync_servers import ARCH, Servers
from tests.sglang.sync_student import Agreement, SyncedStudent, compare, serves
from tests.sglang.sync_ways import KINDS, server_sync

pytest_plugins = ["tests.sglang.sync_servers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One update: the student had made `updates` of them, and this is what one of the servers made of it."""

    kind: str
    updates: int
    report: SyncReport
    agreement: Agreement


def _ten_steps_each(servers: list[ServerConnection], folder: Path) -> tuple[list[Sent], list[str], list[str]]:
    student = SyncedStudent((1, 1, 1, 1), ARCH)
    syncs = {kind: server_sync(kind, folder, ARCH) for kind in KINDS}
    sent: list[Sent] = []
    for step in range(10):
        for place, kind in enumerate(KINDS):
            # A step before each: with the weights of the way before it, a way that sends nothing would be right too.
            student.train()
            report = sync_weights(student.weights(), student.steps, student.world, syncs[kind], servers)
            agreement = compare(student, servers[(step + place) % 2])
            sent.append(Sent(kind=kind, updates=student.steps, report=report, agreement=agreement))
    snapshots = _names(folder / "weights")
    for sync in syncs.values():
        sync.close()
    return sent, snapshots, _names(folder / "weights")


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_ten_steps_each_way_give_the_students_log_probs_and_routing(pair: Servers, tmp_path: Path) -> None:
    ((sent, snapshots, after),) = run_ranks(_ten_steps_each, 1, pair.connections, tmp_path, init=False, timeout=3000)
    assert [(one.kind, one.updates) for one in sent] == [(KINDS[i % 3], i + 1) for i in range(30)]
    num_bytes = 4 * sum(torch.Size(t.shape).numel() for t in model_tensors(ARCH))
    for one in sent:
        print(one)  # the figures, for those who run this with -s
        assert one.report.synced == tuple(server.url for server in pair.connections)
        assert one.report.num_bytes == num_bytes
        assert one.agreement.tokens == 2048
        assert one.agreement.max_difference < 1e-4
        assert one.agreement.same_routing == 1.0
        assert one.agreement.versions == {f"run-{one.kind}:{one.updates}"}
    assert (snapshots, after) == (["update-00000030"], [])


def test_a_colocated_server_rests_until_the_next_update(pair: Servers, tmp_path: Path) -> None:
    server = pair.connections[0]

    def work() -> tuple[dict[str, str], list[bool], list[SyncReport]]:
        student = SyncedStudent((1, 1, 1, 1), ARCH)
        sync = server_sync("tensor", tmp_path, ARCH, colocated=True)
        reports = [sync.push(student.weights(), 0, [server])]
        failed = dict(sync.release([server]))
        served = [serves(server, seconds=5)]
        student.train()
        reports.append(sync.push(student.weights(), 1, [server]))
        served.append(serves(server))
        assert compare(student, server).max_difference < 1e-4
        return failed, served, reports

    ((failed, served, reports),) = run_ranks(work, 1, init=False, timeout=600)
    assert failed == {}
    assert served == [False, True]
    assert [report.synced for report in reports] == [(server.url,)] * 2
