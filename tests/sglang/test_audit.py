"""`mopd audit` with servers of its own: the bars of the issue, in float32 and bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import write_run
from tests.sglang.trainer_side import run_file

SECONDS = 1500


def audited(models: Path, folder: Path, dtype: str, parallel: dict[str, int]) -> dict[str, Any]:
    tree = run_file(models, folder / "run", launch={"servers": 1})
    for domain in tree["domains"].values():
        domain["max_response_tokens"] = 64
    tree |= {
        "model": {"checkpoint": str(models / "student"), "dtype": dtype},
        "evaluation": {"prompts": 32},
        "parallel": parallel,
    }
    file = folder / "audit.json"
    path = str(write_run(folder / "run.yaml", tree))
    command = [sys.executable, "-m", "megatron_mopd", "audit", path, "--prompts", "28", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    print(result.stdout)
    assert file.exists(), result.stderr
    found: dict[str, Any] = json.loads(file.read_text()) | {"exit_code": result.returncode}
    assert list((folder / "run").iterdir()) == [folder / "run" / "audit"]
    return found


def by_name(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {f"{pair['left']} / {pair['right']}": pair["all"] for pair in found["log_probs"]}


def test_float32(models: Path, tmp_path: Path) -> None:
    found = audited(models, tmp_path, "float32", {"tensor": 2, "expert": 2})
    pairs = by_name(found)
    assert pairs["engine / student"]["tokens"] >= 2000
    for name in ("engine / student", "engine re-scoring / student"):
        assert pairs[name]["largest"] < 1e-4, name
    assert pairs["teacher / student"]["largest"] == 0.0
    assert {routing["left"]: routing["same"] for routing in found["routing"]} == {
        "engine": 1.0,
        "engine re-scoring": 1.0,
    }
    assert [rendering["differing"] for rendering in found["chat_template"]] == [0, 0]
    assert found["chat_template"][1]["by"].startswith("http://127.0.0.1:")
    assert (found["exit_code"], found["passed"], found["blamed"]) == (0, True, [])


def test_bfloat16(models: Path, tmp_path: Path) -> None:
    """A second server, in float32, shows that nothing but the dtype is in the way."""
    found = audited(models, tmp_path, "bfloat16", {"ranks": 1})
    pairs = by_name(found)
    assert pairs["engine / student"]["tokens"] >= 2000
    assert pairs["engine re-scoring fp32 / student fp32"]["largest"] < 1e-4
    routing = {routing["left"]: routing["same"] for routing in found["routing"]}
    assert routing["engine re-scoring fp32"] == 1.0
    assert 0.9 < routing["engine"] <= 1.0
    assert 1e-3 < pairs["engine / student"]["largest"] < 1.0
    assert abs(pairs["engine / student"]["kl"]) < 2e-2
    assert 0 < pairs["engine / student"]["k3"] < 2e-3
    assert pairs["teacher / student"]["largest"] == 0.0
    assert (found["exit_code"], found["passed"]) == (0, True)
    assert "dtype" in found["blamed"] and "engine" not in found["blamed"]
