"""python -m tests.distributed.full_width [FOLDER]: two layers of Qwen3-30B-A3B at full width through Megatron and back.

Hugging Face -> Megatron (TP2 EP2, gloo) -> Hugging Face must be bit-identical; no rank may need more memory than its
part of the model and 1 GB (10^9 bytes). Takes 7.5 GB in FOLDER (default: a temporary one), 7 GB of memory, two minutes.
`make test` runs the same on a smaller model (`test_full_width.py`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.config import ParallelSpec
from megatron_mopd.parallel import cpu
from megatron_mopd.student.architecture import Architecture, parse_architecture, read_architecture
from megatron_mopd.student.hf_files import TensorSpec, content_hash, write_model
from megatron_mopd.student.weight_table import model_tensors
from tests import qwen3_30b_a3b
from tests.distributed.ranks import run_ranks

cpu.install()

FULL_WIDTH = qwen3_30b_a3b.CONFIG | {"num_hidden_layers": 2, "torch_dtype": "bfloat16"}
LAYOUT = ParallelSpec(tensor=2, expert=2)
_PERIOD = 1_048_583
"""Values after which the numbers repeat: a prime, so that no two rows, experts or heads are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    before: int
    """Resident, with torch and Megatron imported and the process group joined."""
    peak: int
    """Most that was resident from there on, beyond `before`; mapped files count."""
    shard: int
    """This rank's parameters."""


def write_synthetic(folder: Path, config: Mapping[str, Any]) -> Architecture:
    """A model folder with bfloat16 numbers that differ everywhere; one tensor at a time is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = parse_architecture(dict(config), str(folder))
    specs = [TensorSpec(name=t.name, shape=t.shape, dtype=torch.bfloat16) for t in model_tensors(arch)]
    write_model(folder, specs, _numbers(specs))
    return arch


def _numbers(specs: list[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    values = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0)).bfloat16()
    begin = 0
    for spec in specs:
        count = torch.Size(spec.shape).numel()
        repeats = -(-(begin + count) // _PERIOD)
        yield spec.name, values.repeat(repeats)[begin : begin + count].view(spec.shape)
        begin = (begin + count) % _PERIOD


def through_megatron(source: Path, out: Path) -> Memory:
    """On each rank: load `source`, write it to `out`."""
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.model import build_model
    from megatron_mopd.student.weight_stream import export_hf
    from megatron_mopd.student.weights import load_hf

    world = start_world(LAYOUT, 0)
    arch = read_architecture(source)
    world.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    model = build_model(arch, LAYOUT, world, torch.bfloat16, training=False)
    load_hf(model, arch, source, world)
    export_hf(model, arch, world, out, source)
    shard = sum(parameter.nbytes for parameter in model.parameters())
    stop_world()
    return Memory(before=before, peak=status_bytes("VmHWM") - before, shard=shard)


def status_bytes(key: str) -> int:
    """Of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> int:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
        folder, started = Path(name), time.monotonic()
        arch = write_synthetic(folder / "in", FULL_WIDTH)
        print(f"wrote {sum(torch.Size(t.shape).numel() for t in model_tensors(arch)):,} parameters in bfloat16")
        ranks = run_ranks(through_megatron, 2, folder / "in", folder / "out", init=False, timeout=1800)
        same = content_hash(folder / "in") == content_hash(folder / "out")
        for rank, memory in enumerate(ranks):
            print(
                f"rank {rank}: part of the model {memory.shard / 1e9:.2f} GB, peak {memory.peak / 1e9:.2f} GB "
                f"(+ {memory.before / 1e9:.2f} GB of Python, torch and Megatron)"
            )
        print(f"{'bit-identical' if same else 'DIFFERENT'} after {time.monotonic() - started:.0f} s")
    return 0 if same and all(memory.peak < memory.shard + 1e9 for memory in ranks) else 1


if __name__ == "__main__":
    sys.exit(main())
