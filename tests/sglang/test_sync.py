"""The student's weights on real servers after every step, each way of sending them: the same numbers on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.push import sync_weights
from megatron_mopd.student.weight_table import model_tensors
from tests.distributed.ranks import run_ranks
from tests.sglang.sync_servers import ARCH, Servers
from tests.sglang.sync_student import Agreement, SyncedStudent, compare
from tests.sglang.sync_ways import KINDS, server_sync

pytest_plugins = ["tests.sglang.sync_servers"]


def _ten_steps(servers: list[ServerConnection], folder: Path) -> tuple[list[tuple[int, str, Agreement]], Any]:
    student = SyncedStudent((1, 1, 1, 1), ARCH)
    syncs = {kind: server_sync(kind, folder, student.arch) for kind in KINDS}
    found, reports = [], []
    for step in range(10):
        student.train()
        for place, kind in enumerate(KINDS):
            report = sync_weights(student.weights(), student.steps, student.world, syncs[kind], servers)
            reports.append((kind, report))
            # In turn, so that both servers are looked at, and only weights that this kind sent.
            found.append((step, kind, compare(student, servers[(step + place) % 2])))
    for sync in syncs.values():
        sync.close()
    return found, reports


def test_ten_steps_each_way_give_the_students_log_probs_and_routing(pair: Servers, tmp_path: Path) -> None:
    folder = pair.folder.parent / "ten"
    ((found, reports),) = run_ranks(_ten_steps, 1, pair.connections, folder, init=False, timeout=3000)
    assert len(found) == 30
    for step, kind, agreement in found:
        print(step, kind, agreement)
        assert agreement.tokens == 2048
        assert agreement.max_difference < 1e-4, (step, kind)
        assert agreement.same_routing == 1.0, (step, kind)
        assert agreement.versions == {f"run-{kind}:{step + 1}"}
    for kind, report in reports:
        print(kind, report.seconds, report.num_bytes)
        assert report.synced == tuple(server.url for server in pair.connections)
        assert report.num_bytes == 4 * sum(torch.Size(t.shape).numel() for t in model_tensors(ARCH))
    assert [path.name for path in (folder / "weights").iterdir()] == ["update-00000010"]
