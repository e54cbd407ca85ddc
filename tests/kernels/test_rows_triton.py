"""The Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported: in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run_interpreted(name: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name(name))],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize("name", ["triton_interpreted.py", "triton_excluded_interpreted.py"])
def test_interpreted_kernels(name: str) -> None:
    run_interpreted(name)


def test_cpu_tensors_without_the_interpreter() -> None:
    code = (
        "import torch\n"
        "from kernels import rows_triton\n"
        "rows_triton.divergence_sums(torch.zeros(1, 8), torch.zeros(1, 8), both=False)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "ValueError: Triton kernels cannot run on logits on cpu" in result.stderr
