"""Memory and time of a merge of large checkpoints, which are made up in a temporary folder first.

    python -m megatron_mopd.merge.bench --gb 8 --method ties [--models 2] [--folder DIR]

The memory is what the merge adds to the process: the highest resident set during it, pages of mapped files included,
less the resident set before it. Of several methods, the later ones may find memory that the first one added: give
one to be sure. The folder needs room for the base, the models and the result.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.merge.config import RANDOM, MergeConfig
from megatron_mopd.merge.run import run_merge
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.student.hf_files import TensorSpec, write_model
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.yaml_config import ConfigError

METHODS = ("average", "task_arithmetic", "ties", "dare", "dare_ties", "sce")
_TOKENIZER = Path("configs/tiny/model")
_BLOCK = 1 << 22
_SAMPLE_SECONDS = 0.002


def main(argv: Sequence[str] | None = None) -> int:
    """Make the checkpoints, merge them by each method, print the figures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.merge.bench", description=__doc__)
    parser.add_argument("--gb", type=float, default=8.0, help="size of each checkpoint (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["ties"])
    parser.add_argument("--models", type=int, default=2, help="models beside the base (default: %(default)s)")
    parser.add_argument("--folder", help="where to make the temporary folder (default: the system's)")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="mopd-merge-", dir=arguments.folder) as folder:
            return _bench(Path(folder), arguments.gb, arguments.method, arguments.models)
    except ConfigError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


def _bench(folder: Path, gb: float, methods: Sequence[str], models: int) -> int:
    needed = gb * 1e9 * (models + 2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"{folder}: needs {needed / 1e9:.0f} GB, has {free / 1e9:.0f} GB free; set --folder or --gb")
    for number in range(models + 1):
        size = write_synthetic(folder / f"model{number}", gb, number)
    print(f"{models} models and a base of {size / 1e9:.2f} GB each, {torch.get_num_threads()} threads", flush=True)
    print(f"{'method':16} {'memory added':>14} {'seconds':>9} {'GB/s':>7}", flush=True)
    for method in methods:
        config = MergeConfig(
            out=str(folder / "out"),
            base=str(folder / "model0"),
            models={f"model{number}": str(folder / f"model{number}") for number in range(1, models + 1)},
            method=method,  # type: ignore[arg-type]
            density=0.5 if method in RANDOM else None,
        )
        start = time.monotonic()
        with PeakMemory() as memory:
            run_merge(config)
        seconds = time.monotonic() - start
        print(f"{method:16} {memory.added / 1e9:11.3f} GB {seconds:9.1f} {size / 1e9 / seconds:7.3f}", flush=True)
        shutil.rmtree(folder / "out")
    return 0


class PeakMemory:
    """`added`: bytes by which the resident set rose, at its highest, while the context was entered.

    Linux keeps a high-water mark, but a process may not be allowed to reset it: it is used where it rose, and
    samples, taken every 2 ms, where it did not.
    """

    added = 0

    def __enter__(self) -> PeakMemory:
        self._before, self._mark = _status("VmRSS"), _status("VmHWM")
        self._highest = self._before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        mark = _status("VmHWM")
        self.added = max(self._highest, mark if mark > self._mark else 0) - self._before

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, _status("VmRSS"))


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def write_synthetic(folder: Path, gb: float, seed: int) -> int:
    """A bf16 Qwen3-MoE with the widths and the vocabulary of Qwen3-30B-A3B, at least `gb` GB; returns its bytes.

    Seed 0 is the base. The others are the base plus noise of a few bf16 steps, as RL leaves it: many elements do
    not change at all, and many changes are equal. Below 2.6 GB the widths are smaller.
    """
    folder.mkdir()
    for file in _TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    config = json.loads((_TOKENIZER / "config.json").read_text()) | _shape(gb)
    (folder / "config.json").write_text(json.dumps(config))
    specs = [
        TensorSpec(name=tensor.name, shape=tensor.shape, dtype=torch.bfloat16)
        for tensor in model_tensors(read_architecture(folder))
    ]
    write_model(folder, specs, ((spec.name, _values(spec, number, seed)) for number, spec in enumerate(specs)))
    return sum(spec.num_bytes for spec in specs)


def _shape(gb: float) -> dict[str, object]:
    """Keys of config.json: a layer of 128 experts has 1.25 GB, embedding and output layer together as well."""
    hidden, expert, vocabulary, layer = 2048, 768, 151936, 1.25
    layers = max(1, math.ceil((gb - 1.25) / layer))
    experts = 128
    if gb < 2.6:
        hidden, expert, vocabulary, experts = 256, 96, max(1024, int(gb * 1e9 * 0.4 / 512)), 8
        layers = max(1, int(gb * 1e9 * 0.2 / 2 / (8 * 3 * hidden * expert)))
    return {
        "hidden_size": hidden,
        "moe_intermediate_size": expert,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_attention_heads": 32 if hidden == 2048 else 4,
        "num_key_value_heads": 4,
        "head_dim": 128 if hidden == 2048 else 64,
    }


def _values(spec: TensorSpec, number: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(number)
    noise = torch.Generator().manual_seed(seed * 1_000_003 + number)
    size = torch.Size(spec.shape).numel()
    for begin in range(0, size, _BLOCK):
        count = min(_BLOCK, size - begin)
        values = torch.empty(count).uniform_(-0.1, 0.1, generator=generator)
        if seed:
            values += torch.empty(count).uniform_(-1e-4, 1e-4, generator=noise)
        yield values


if __name__ == "__main__":
    sys.exit(main())
