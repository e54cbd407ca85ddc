"""`python -m megatron_mopd.smoke [--device cuda|cpu]`: see `launch/h100_smoke.sh`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_mopd.smoke.kernel_checks import kernel_checks
from megatron_mopd.smoke.result import Result, table
from megatron_mopd.smoke.server_checks import PYTHON, server_checks
from megatron_mopd.smoke.training_checks import training_checks

ONLY_GPUS = (
    "not checked without a GPU: Triton and CUDA kernels, Transformer Engine and grouped GEMM, NCCL, pinned copies of "
    "teachers on a side stream, weights to servers by NCCL and CUDA IPC"
)


def checks(device: str, folder: Path, python: str) -> Iterator[Result]:
    """All of them, one after the other."""
    yield from kernel_checks(torch.device(device))
    yield from training_checks(device, folder)
    yield from server_checks(device, folder, python)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if nothing failed, 1 if something did, 2 without the device."""
    parser = argparse.ArgumentParser(prog="smoke", description="check every path that a GPU has", allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: what exists there")
    parser.add_argument("--sglang-python", metavar="FILE", default=PYTHON, help="of SGLang's environment")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("mopd: error: no GPU is visible here; --device cpu checks what exists on the CPU", file=sys.stderr)
        return 2
    results = []
    with tempfile.TemporaryDirectory(prefix="mopd-smoke-") as folder:
        for result in checks(arguments.device, Path(folder), arguments.sglang_python):
            print(f"{result.verdict:>7}  {result.name}", file=sys.stderr, flush=True)
            results.append(result)
    print(table(results))
    failed = sum(result.verdict == "failed" for result in results)
    skips = sum(result.verdict == "skipped" for result in results)
    print(f"{len(results) - failed - skips} ok, {failed} failed, {skips} skipped")
    if arguments.device == "cpu":
        print(ONLY_GPUS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
