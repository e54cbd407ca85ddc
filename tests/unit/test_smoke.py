"""`launch/h100_smoke.sh`: its verdicts, its table and exit codes, and the whole of it on the CPU."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mopd.smoke import __main__ as smoke
from megatron_mopd.smoke import training_checks
from megatron_mopd.smoke.kernel_checks import FP32, kernel_checks
from megatron_mopd.smoke.result import Result, attempt, skipped, table

ROOT = Path(__file__).parents[2]


def broken() -> float:
    raise RuntimeError("no kernel image\nis available")


def test_verdicts_and_table() -> None:
    results = [
        attempt("a", 1e-3, lambda: 5e-4),
        attempt("b", 1e-3, lambda: 2e-3),
        attempt("c", 1e-3, lambda: math.nan),
        attempt("d", 1e-3, broken),
        skipped("e", "no GPU"),
    ]
    assert [each.verdict for each in results] == ["ok", "failed", "failed", "failed", "skipped"]
    assert table(results).splitlines() == [
        "check   figure  limit",
        "a      5.0e-04  1e-03  ok",
        "b      2.0e-03  1e-03  failed",
        "c          nan  1e-03  failed",
        "d            -  1e-03  failed: RuntimeError: no kernel image is available",
        "e            -      -  skipped: no GPU",
    ]


@pytest.mark.parametrize(("figure", "code"), [(1e-4, 0), (1.0, 1), (None, 1)])
def test_exit_code(
    figure: float | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def checks(device: str, folder: Path, python: str) -> Iterator[Result]:
        yield Result("x", figure, 1e-3)

    monkeypatch.setattr(smoke, "checks", checks)
    assert smoke.main(["--device", "cpu"]) == code
    assert capsys.readouterr().out.endswith(f"{1 - code} ok, {code} failed, 0 skipped\n{smoke.ONLY_GPUS}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main([]) == 2
    assert "--device cpu checks what exists on the CPU" in capsys.readouterr().err


def test_kernels_are_measured_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    results = list(kernel_checks(torch.device("cpu")))
    assert [each.verdict for each in results] == ["ok"] * 10 + ["skipped"]
    assert all(each.figure is not None and each.figure > 0 for each in results[:-1])
    from megatron_mopd.smoke import kernel_checks as module

    right = module.divergence
    monkeypatch.setattr(module, "divergence", lambda *a, **k: right(*a, **k) * (1 + 2 * FP32))
    wrong = {each.name: each.verdict for each in kernel_checks(torch.device("cpu"))}
    assert [name for name, verdict in wrong.items() if verdict == "failed"] == [
        f"kernels: divergence {kind}, cpp, fp32" for kind in ("reverse_kl", "forward_kl", "jsd", "mixed")
    ]


def test_a_rank_that_fails_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_ranks(*arguments: object, **options: object) -> None:
        raise RuntimeError("rank 1 ended with 1: NCCL error")

    monkeypatch.setattr(training_checks, "run_ranks", run_ranks)
    (result,) = training_checks.training_checks("cpu", tmp_path)
    assert (result.verdict, result.reason) == ("failed", "rank 1 ended with 1: NCCL error")


def test_all_of_it_on_the_cpu() -> None:
    command = ["bash", str(ROOT / "launch" / "h100_smoke.sh"), "--device", "cpu", "--sglang-python", "nowhere/python"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "25 ok, 0 failed, 3 skipped" in done.stdout
    assert re.search(r"one update, full_vocab, gradient norm +\S+ +1e-04  ok", done.stdout)
    assert re.search(r"weights by distributed.* skipped: no nowhere/python: make sglang", done.stdout)
