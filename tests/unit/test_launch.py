"""Real forked ranks: results, failures, signals, ports, orphans."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.config import ParallelSpec
from megatron_mopd.environment import joined_world, prepare_environment, world_size
from megatron_mopd.launch import Outcome, run_ranks
from megatron_mopd.signals import StopFlag
from megatron_mopd.yaml_config import ConfigError


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def _rank() -> int:
    return int(os.environ["RANK"])


def _reduce_own_rank(add: float) -> list[float]:
    dist.init_process_group("gloo")
    value = torch.tensor([_rank() + add])
    dist.all_reduce(value)
    total = [float(value), float(dist.get_world_size()), float(os.environ["LOCAL_RANK"])]
    dist.destroy_process_group()
    return total


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_reduce_and_rank_0_answers(ranks: int) -> None:
    outcome = run_ranks(_reduce_own_rank, (0.5,), ranks=ranks)
    assert outcome == Outcome(exit_code=0, result=[sum(range(ranks)) + 0.5 * ranks, ranks, 0.0])
    assert "RANK" not in os.environ


def test_a_result_larger_than_a_pipe_arrives() -> None:
    assert run_ranks(lambda: b"x" * 3_000_000, ranks=2).result == b"x" * 3_000_000


def test_other_ranks_write_to_their_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def speak() -> None:
        print(f"this is {_rank()}")

    assert run_ranks(speak, ranks=2, log_dir=tmp_path / "logs").exit_code == 0
    assert capfd.readouterr().out == "this is 0\n"
    assert (tmp_path / "logs" / "rank1.log").read_text() == "this is 1\n"


def test_an_exception_ends_all_ranks_and_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    def fail_on_1() -> None:
        dist.init_process_group("gloo")
        if _rank() == 1:
            raise ValueError("the loss is\nnot finite")
        dist.all_reduce(torch.ones(1))  # its error about the lost peer is an echo
        time.sleep(60)

    started = time.monotonic()
    outcome = run_ranks(fail_on_1, ranks=3, grace=2)
    error = capfd.readouterr().err
    assert outcome.exit_code == 1
    assert time.monotonic() - started < 20
    lines = error.splitlines()
    assert lines[-1] == ("mopd: rank 1 failed: ValueError: the loss is not finite; the other ranks were stopped")
    assert error.count("Traceback") == 1
    assert "fail_on_1" in error


def test_a_config_error_of_the_ranks_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ConfigError("teachers.math: has another vocabulary")

    assert run_ranks(refuse, ranks=2).exit_code == 2
    assert capfd.readouterr().err == "mopd: error: teachers.math: has another vocabulary\n"


def test_kill_9_of_a_rank_ends_the_others(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def victim() -> None:
        dist.init_process_group("gloo")
        (tmp_path / f"pid{_rank()}").write_text(str(os.getpid()))
        dist.barrier()
        with StopFlag():  # a rank that ignores SIGTERM, as one in the middle of a step does
            if _rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    started = time.monotonic()
    outcome = run_ranks(victim, ranks=3, grace=1)
    assert time.monotonic() - started < 20
    assert outcome.exit_code == 128 + signal.SIGKILL
    error = capfd.readouterr().err
    assert error == "mopd: rank 1 was killed by SIGKILL (out of memory?); the other ranks were stopped\n"
    assert not any(_alive(int(file.read_text())) for file in tmp_path.glob("pid*"))


def test_helpers_of_a_killed_rank_go_with_it(tmp_path: Path) -> None:
    def with_helper() -> None:
        helper = subprocess.Popen(["sleep", "60"])
        (tmp_path / "helper").write_text(str(helper.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_ranks(with_helper, ranks=1).exit_code == 137
    assert _gone_within(int((tmp_path / "helper").read_text()), 5)


def test_an_exit_code_of_a_rank_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(lambda: os._exit(7), ranks=1).exit_code == 1
    assert capfd.readouterr().err == "mopd: rank 0 ended with exit code 7\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_ranks_save_and_leave(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def steps() -> int:
        dist.init_process_group("gloo")
        flag = torch.zeros(1)
        with StopFlag() as stop:
            (tmp_path / f"ready{_rank()}").touch()
            for step in range(1000):
                flag.fill_(stop.requested)
                dist.all_reduce(flag)
                if flag.item():
                    (tmp_path / f"saved{_rank()}").write_text(str(step))
                    return step
                time.sleep(0.02)
        return -1

    _signal_when(number, [tmp_path / f"ready{rank}" for rank in range(3)])
    before = signal.getsignal(number)
    outcome = run_ranks(steps, ranks=3)
    assert signal.getsignal(number) is before
    assert (outcome.exit_code, outcome.stopped_by) == (128 + number, number)
    saved = {(tmp_path / f"saved{rank}").read_text() for rank in range(3)}
    assert saved == {str(outcome.result)}, "every rank saved, and at the same step"
    assert capfd.readouterr().err == f"mopd: {number.name}: saving and leaving; again to kill\n"


def test_a_second_signal_kills(tmp_path: Path) -> None:
    def deaf() -> None:
        with StopFlag():
            (tmp_path / f"ready{_rank()}").touch()
            time.sleep(60)

    ready = [tmp_path / f"ready{rank}" for rank in range(2)]
    _signal_when(signal.SIGTERM, ready, times=2)
    started = time.monotonic()
    assert run_ranks(deaf, ranks=2).exit_code == 128 + signal.SIGTERM
    assert time.monotonic() - started < 20


def test_a_signal_before_anyone_listens_stops_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def start_up() -> None:
        (tmp_path / f"ready{_rank()}").touch()
        time.sleep(60)

    _signal_when(signal.SIGTERM, [tmp_path / f"ready{rank}" for rank in range(2)])
    assert run_ranks(start_up, ranks=2).exit_code == 128 + signal.SIGTERM
    assert capfd.readouterr().err.count("\n") == 1


def test_an_occupied_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^parallel.port: {port} is in use by another process; choose"):
            run_ranks(lambda: (tmp_path / "started").touch(), ranks=2, port=port)
    assert not (tmp_path / "started").exists()
    assert run_ranks(_reduce_own_rank, (0.0,), ranks=2, port=port).result == [1.0, 2.0, 0.0]


def test_kill_9_of_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from megatron_mopd.launch import run_ranks
        def wait():
            Path({str(tmp_path)!r}, "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
            time.sleep(60)
        run_ranks(wait, ranks=3)
    """)
    launcher = subprocess.Popen([sys.executable, "-c", script])
    files = [tmp_path / f"pid{rank}" for rank in range(3)]
    _wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    launcher.wait()
    assert all(_gone_within(int(file.read_text()), 5) for file in files)


def test_a_world_started_by_torchrun_or_srun_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert joined_world() is None, "an sbatch script has these too"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "12345")
    # Registered here so that what joined_world() sets is undone after the test.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    assert joined_world() == (2, 4)
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("2", "0")
    assert world_size(ParallelSpec(ranks=1)) == 4
    pid = os.getpid()
    assert run_ranks(os.getpid, ranks=9).result == pid, "called here, nothing forked"
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        joined_world()


def test_world_size_is_what_the_file_says_or_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert world_size(ParallelSpec(ranks=6, tensor=2)) == 6
    assert world_size(ParallelSpec(tensor=2, pipeline=2, expert=4)) == 8
    assert world_size(ParallelSpec()) == 1


def test_thread_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    prepare_environment()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")


def test_launching_imports_no_torch() -> None:
    code = "import megatron_mopd.launch, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_stop_flag_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        assert stop.received is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def _signal_when(number: signal.Signals, files: list[Path], times: int = 1) -> None:
    """From a thread, signal this process once all `files` exist, as a terminal would."""

    def send() -> None:
        _wait_until(lambda: all(file.exists() for file in files))
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=send, daemon=True).start()


def _wait_until(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)
