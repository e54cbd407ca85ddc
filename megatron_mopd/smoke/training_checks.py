"""One update with each objective, log-probs and swapped teachers: on the device, and on one rank of the CPU in fp32."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.smoke.measure import OBJECTIVES, TEACHERS
from megatron_mopd.smoke.result import Result, attempt

SHAPES = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
"""Small, but of sizes that attention and grouped products on GPUs take."""
SECONDS = 900
RANKS = 2
LIMITS = {"cpu": (1e-4, 1e-4), "cuda": (5e-2, 1e-1)}
"""Device -> limits of log-probs (absolute) and of losses and gradient norms (relative). On a GPU the
model is bf16; chosen without one, so a figure just above them is a question, not yet a fault."""


def training_checks(device: str, folder: Path) -> Iterator[Result]:
    """Ranks of the device, two where there are as many GPUs (on a CPU always), against one rank of the CPU in fp32."""
    ranks = RANKS if device == "cpu" else min(RANKS, torch.cuda.device_count())
    logprob_limit, limit = LIMITS[device]
    layout = f"{ranks} rank{'s: TP and EP' if ranks > 1 else ''}"
    try:
        write_models(folder)
        expected = run_ranks(folder, folder / "cpu.pt", 1, on_gpu=False)
        found = run_ranks(folder, folder / "device.pt", ranks, on_gpu=device == "cuda")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        yield Result(f"training: {layout}", None, limit, " ".join(str(error).split())[-300:])
        return
    layers = "Transformer Engine, grouped GEMM" if device == "cuda" else "local layers"
    yield attempt(
        f"training: log-probs, {layers}, {layout}", logprob_limit, lambda: _apart(found, expected, "logprobs")
    )
    copies = "copied on a side stream, two buffers" if device == "cuda" else "bank, which copies nothing on a CPU"
    yield attempt(f"teachers: {copies}, against loaded in place", 0.0, lambda: float(found["swap"]))
    offload, apart = ("copied on a side stream", 1e-2) if device == "cuda" else ("copied", 0.0)
    yield attempt(f"AdamW: moments in host memory, {offload}; of lr", apart, lambda: float(found["offload"]))
    for name in OBJECTIVES:
        for figure, key in (("loss", f"loss {name}"), ("gradient norm", f"grad_norm {name}")):
            check = partial(_relative, found, expected, key)
            yield attempt(f"training: one update, {name}, {figure}", limit, check)


def write_models(folder: Path) -> None:
    """The student and its teachers, with random weights that are the same everywhere and that bf16 can hold."""
    from safetensors.torch import save_file

    from megatron_mopd.student.architecture import parse_architecture
    from megatron_mopd.student.weight_table import model_tensors

    arch = parse_architecture(SHAPES, "smoke")
    for seed, name in enumerate(("student", *TEACHERS)):
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for each in model_tensors(arch):
            values = torch.randn(each.shape, generator=generator) * arch.init_std
            weights[each.name] = (1 + values if len(each.shape) == 1 else values).bfloat16()
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(SHAPES), encoding="utf-8")
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})


def run_ranks(folder: Path, out: Path, ranks: int, *, on_gpu: bool) -> dict[str, Tensor]:
    """`measure` on so many processes of this machine. RuntimeError with the end of a rank's output where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in own.items()}
        if not on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (folder / f"{out.stem}-rank{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "megatron_mopd.smoke.measure", str(folder), str(out)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        if code:
            log_text = (folder / f"{out.stem}-rank{rank}.log").read_text(errors="replace")
            raise RuntimeError(f"rank {rank} ended with {code}: {log_text}")
    found: dict[str, Tensor] = torch.load(out, weights_only=True)
    if bool(found["on_gpu"]) != on_gpu:
        raise RuntimeError(f"the ranks ran on {'a GPU' if found['on_gpu'] else 'the CPU'}, which was not meant")
    return found


def _apart(found: dict[str, Tensor], expected: dict[str, Tensor], key: str) -> float:
    return float((found[key] - expected[key]).abs().max())


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor], key: str) -> float:
    return float((found[key] - expected[key]).abs() / expected[key].abs())
