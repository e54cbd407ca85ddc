"""Weights from students on several ranks to a server on two tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.push import SyncReport, sync_weights
from megatron_mopd.student.architecture import parse_architecture
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.trainee import Degrees
from tests.sglang.sync_servers import PYTHON, RAW, Servers, running
from tests.sglang.sync_student import Agreement, SyncedStudent, compare
from tests.sglang.sync_ways import KINDS, server_sync

WIDE = RAW | {"moe_intermediate_size": 64}
"""On a CPU SGLang pads each rank's part of an expert to 32 columns; padded parts have checksums of their own."""
ARCH = parse_architecture(WIDE, "test")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if not Path(PYTHON).exists():
        pytest.skip("no SGLang here: run `make sglang`")
    folder = tmp_path_factory.mktemp("wide")
    tiny.write_model(folder / "model", WIDE)
    with running(folder / "model", folder / "logs", count=1, tensor=2) as servers:
        yield servers


def _each_way(degrees: Degrees, server: ServerConnection, folder: Path) -> list[tuple[SyncReport, Agreement | None]]:
    """The checksum of both ranks is compared in every push; log-probs where one rank has all of the student."""
    student = SyncedStudent(degrees, ARCH)
    found = []
    for kind in KINDS:
        student.train()
        sync = server_sync(kind, folder, ARCH) if student.world.is_main else None
        report = sync_weights(student.weights(), student.steps, student.world, sync, [server] if sync else [])
        assert not report.failed, report  # a server that failed stays paused: asked, it would not answer
        found.append((report, compare(student, server) if student.world.size == 1 else None))
        if sync is not None:
            sync.close()
    return found


@pytest.mark.parametrize(
    "degrees", [(1, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2)], ids=lambda d: "".join(map(str, d))
)
def test_each_way_reaches_both_ranks_of_a_server(degrees: Degrees, wide: Servers, tmp_path: Path) -> None:
    (server,) = wide.connections
    results = run_ranks(_each_way, degrees[0], degrees, server, tmp_path, init=False, timeout=1200)
    for ours in results:
        assert [report.synced for report, _ in ours] == [(server.url,)] * 3
        assert [report for report, _ in ours] == [report for report, _ in results[0]]
    for _, agreement in results[0]:
        assert agreement is None or (agreement.max_difference < 1e-4 and agreement.same_routing == 1.0)
    assert server.get("/model_info")["weight_version"] == "run-disk:3"
