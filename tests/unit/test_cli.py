"""The command line: help that teaches, one line for a mistake, exit codes, and ranks that really start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_mopd import cli, launch, preflight
from megatron_mopd.config import RunConfig

GOOD = """\
run_dir: {folder}/run
stage: sft
steps: 3
prompts_per_step: 4
model: {{hf_config: m}}
domains: {{a: {{source: {{reasoning_gym: chain_sum}}}}}}
objective: {{kind: cross_entropy}}
optim: {{lr: 1e-3}}
parallel: {{ranks: 2}}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.format(folder=tmp_path))
    return path


@pytest.fixture
def launchable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what needs a model on disk: these tests are about what comes before and after."""
    monkeypatch.setattr(preflight, "check", lambda config, world_size: None)
    monkeypatch.setattr(preflight, "check_evaluation", lambda config, checkpoint, world_size, split: None)
    monkeypatch.setattr(launch, "PRELOAD", ())
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def _one_line(capfd: pytest.CaptureFixture[str]) -> str:
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["run", "eval", "export", "demo", "examples:", "exit codes:", "mopd demo"]),
        (
            ["run"],
            ["mopd run CONFIG [options] [key.path=value ...]", "newest checkpoint", "torchrun", "Ctrl-C"],
        ),
        (["eval"], ["--checkpoint DIR", "held-out", "mopd eval configs/tiny/mopd.yaml --checkpoint"]),
        (["export"], ["--hf OUT", "safetensors", "examples:"]),
        (["demo"], ["--run-dir", "runs/demo", "goes on where it stopped"]),
        (["benchmark"], ["mopd benchmark NAME --from FILE --out FILE [options]\n", "swe_bench_verified"]),
        (["report"], ["mopd report RUN... [options]\n", "--out DIR"]),
    ],
)
def test_help_teaches(arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in parts:
        assert part in text
    assert max(map(len, text.splitlines())) <= 112


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (("steps: 3", "stepz: 3"), [], "unknown key 'stepz'. Did you mean 'steps'?"),
        (("steps: 3", "steps: 3\nsteps: 4"), [], "line 4: key 'steps' appears twice; keep one"),
        (("steps: 3", "steps: many"), [], "steps: expected int, got 'many' (str)"),
        (("steps: 3", "steps: [3"), [], "not valid YAML: "),
        (("", ""), ["optim.lr"], "override 'optim.lr': write it as key.path=value"),
        (("", ""), ["stage=mopd", "objective.kind=sampled"], "domains.a.teacher: missing"),
    ],
)
@pytest.mark.parametrize("command", ["run", "eval", "export"])
def test_a_mistake_is_one_line_and_exit_code_2(
    command: str,
    change: tuple[str, str],
    overrides: list[str],
    message: str,
    config_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config_file.write_text(config_file.read_text().replace(*change) if change[0] else config_file.read_text())
    options = {"run": [], "eval": ["--checkpoint", "x"], "export": ["--checkpoint", "x", "--hf", "y"]}[command]
    assert cli.main([command, str(config_file), *options, *overrides]) == 2
    line = _one_line(capfd)
    assert line.startswith("mopd: error: ")
    assert message in line
    assert not (config_file.parent / "run").exists(), "nothing was started"


def test_the_installed_command_refuses_before_torch_is_imported(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "sede: 1\n")
    code = (
        "import sys; from megatron_mopd.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(99 if {'torch', 'megatron'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "run", str(config_file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"mopd: error: {config_file}: unknown key 'sede'. Did you mean 'seed'?\n"


def test_python_m_is_the_same_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mopd", "run", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"mopd: error: config file {tmp_path}/none.yaml: No such file or directory\n"


def test_a_reader_that_leaves_is_no_traceback() -> None:
    command = [sys.executable, "-m", "megatron_mopd", "reproduce", "configs/tiny/scaling.yaml", "--dry-run"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == cli.EXIT_NO_READER


def test_an_unknown_option_is_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["run", str(config_file), "--stpes", "5"])
    assert left.value.code == 2
    assert "unknown option --stpes" in capsys.readouterr().err


def test_ctrl_c_before_the_start_is_130(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "check", interrupt)
    assert cli.main(["run", str(config_file)]) == 130


@pytest.mark.usefixtures("launchable")
def test_run_starts_the_ranks_of_the_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(config: RunConfig) -> None:
        where = Path(config.run_dir) / f"steps{os.environ['RANK']}of{os.environ['WORLD_SIZE']}"
        where.write_text(str(config.steps))

    monkeypatch.setattr(cli, "_train_rank", note)
    assert cli.main(["run", str(config_file), "steps=7"]) == 0
    written = {file.name: file.read_text() for file in (config_file.parent / "run").glob("steps*")}
    assert written == {"steps0of2": "7", "steps1of2": "7"}
    assert (config_file.parent / "run" / "logs" / "rank1.log").exists()


@pytest.mark.usefixtures("launchable")
def test_eval_prints_what_rank_0_found(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_evaluate_rank", lambda config, checkpoint, split: {split: {checkpoint: config.steps}})
    # Overrides may stand after options.
    assert cli.main(["eval", str(config_file), "--checkpoint", "there", "steps=9", "seed=1"]) == 0
    assert json.loads(capfd.readouterr().out) == {"held_out": {"there": 9}}
    assert cli.main(["eval", str(config_file), "--checkpoint", "there", "--split", "validation"]) == 0
    assert json.loads(capfd.readouterr().out) == {"validation": {"there": 3}}


@pytest.mark.usefixtures("launchable")
def test_an_occupied_port_starts_nothing(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["run", str(config_file), f"parallel.port={port}"]) == 2
    assert f"parallel.port: {port} is in use" in _one_line(capfd)
    assert not (config_file.parent / "run").exists()


@pytest.mark.usefixtures("launchable")
def test_a_rank_that_is_killed_is_137(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_train_rank", lambda config: os.kill(os.getpid(), signal.SIGKILL))
    assert cli.main(["run", str(config_file)]) == 137
    assert "was killed by SIGKILL" in _one_line(capfd)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_log_that_cannot_be_written_starts_nothing(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(config_file), "log.wandb=mine"]) == 2
    assert "log.wandb: the package wandb is not installed" in _one_line(capfd)


def test_demo_needs_its_configurations(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--config-dir", str(tmp_path / "none")]) == 2
    assert "--config-dir" in _one_line(capfd)
