"""The student's weights in an SGLang server, by each way of sending: its log-probs against the trainer's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_mopd.metrics import read_records
from megatron_mopd.smoke.result import Result, attempt, skipped
from megatron_mopd.student.random_init import write_random_model

PYTHON = ".venv-sglang/bin/python"
MODEL = Path(__file__).parents[2] / "configs" / "tiny" / "model"
SECONDS = 1800
LIMITS = {"cpu": 1e-6, "cuda": 1e-2}
"""Mean KL(mu || p_train) of a token (k3), fp32 on a CPU, bf16 on a GPU: chosen without one."""
RUN = """
stage: mopd
steps: 2
prompts_per_step: 16
teachers: {self: {checkpoint: self}}
allow_identical_teacher: true
domains:
  math:
    source: {reasoning_gym: chain_sum, min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}
    max_prompt_tokens: 24
    max_response_tokens: 12
    teacher: self
objective: {kind: sampled, importance: {kind: tis}}
optim: {lr: 1.0e-3}
evaluation: {prompts: 8}
log: {tensorboard: false}
"""


def server_checks(device: str, folder: Path, python: str) -> Iterator[Result]:
    """A run of two steps for each way, whose second step is sampled with weights that were sent."""
    reason = ""
    if not Path(python).exists():
        reason = f"no {python}: make sglang"
    elif device == "cuda" and torch.cuda.device_count() < 2:
        reason = "needs a GPU for the ranks and one for the server"
    for kind in ("tensor", "distributed"):
        name = f"servers: weights by {kind}, KL of a sampled token"
        if reason:
            yield skipped(name, reason)
        else:
            yield attempt(name, LIMITS[device], partial(_run, device, folder / kind, kind, python))


def _run(device: str, folder: Path, kind: str, python: str) -> float:
    """Of the step after the first update. RuntimeError with the end of the run's output where it fails."""
    folder.mkdir(parents=True)
    write_random_model(folder / "student", MODEL, seed=0)
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    dtype = "bfloat16" if device == "cuda" else "float32"
    values = (
        f"run_dir={folder / 'run'}",
        f"model={{checkpoint: {folder / 'student'}, dtype: {dtype}}}",
        "parallel.ranks=1",
        "rollout.engine=sglang",
        f"rollout.sglang={{launch: {{python: {python}, device: {device}, first_gpu: {int(device == 'cuda')}}}, "
        f"sync: {{kind: {kind}}}}}",
    )
    command = [sys.executable, "-m", "megatron_mopd", "run", str(folder / "run.yaml"), *values]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"mopd run ended with {done.returncode}: {done.stderr}")
    records = read_records(folder / "run" / "metrics.jsonl")
    return abs(float(records[-1]["rollout_kl_k3"]))
