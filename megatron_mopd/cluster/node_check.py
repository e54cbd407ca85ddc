"""The check of one node before a job trains on it: `python -m megatron_mopd.cluster.node_check`, one task per node.

Every task writes `<node>.ok` or `<node>.bad` into the folder that all share, with one line per finding; a node that
wrote neither did not answer. What is reported but not counted against a node starts with `note:`.

The GPU part needs CUDA and has run on no machine of ours yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

NOTE = "note: "
CANARY = "canary"
"""The file that the launcher wrote: a node that cannot read it does not see the run folder."""
PACKAGES = ("torch", "megatron-core", "transformers", "safetensors")
MIN_FREE_GPU_SHARE = 0.9
MIN_FREE_HOST_SHARE = 0.1
PAIR_SECONDS = 60
ELEMENTS = 1 << 22
"""fp32, of the all-reduce between two nodes: 16 MiB."""
REPEATS = 5


def check_storage(folder: Path, token: str) -> Iterator[str]:
    """The launcher's canary can be read here and a file of ours can be written."""
    try:
        found = (folder / CANARY).read_text(encoding="utf-8").strip()
    except OSError as error:
        yield f"{folder / CANARY} cannot be read ({error.strerror}): the run folder is not shared with this node"
        return
    if found != token:
        yield f"{folder / CANARY} has another attempt's content: the run folder is not shared with this node"


def check_software(expected: str) -> Iterator[str]:
    """The same versions everywhere. expected: `versions()` of the job's first node; empty: nothing to compare."""
    missing = [name for name in PACKAGES if _version(name) == "missing"]
    if missing:
        yield f"not installed for {sys.executable}: {', '.join(missing)}"
    elif expected and versions() != expected:
        yield f"other versions than the first node: {versions()}, there {expected}"


def versions() -> str:
    """'python 3.12.1 torch 2.13 ...'"""
    python = ".".join(map(str, sys.version_info[:3]))
    return " ".join([f"python {python}", *(f"{name} {_version(name)}" for name in PACKAGES)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def check_host_memory() -> Iterator[str]:
    """Teachers wait in host memory: a node whose memory is taken already would be killed later."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    free, total = kib["MemAvailable"], kib["MemTotal"]
    if free < MIN_FREE_HOST_SHARE * total:
        yield f"host memory: {free >> 20} of {total >> 20} GiB free"
    shared = os.statvfs("/dev/shm")
    if shared.f_bavail * shared.f_frsize < 64 << 20:
        yield "/dev/shm: less than 64 MiB free; NCCL and data loaders need it (clean it, or start containers with more)"


def check_gpus(wanted: int) -> Iterator[str]:
    """GPUs by nvidia-smi: how many, uncorrected memory errors, memory in use, processes of others."""
    query = "index,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    found = _smi(f"--query-gpu={query}")
    if found is None:
        yield f"nvidia-smi does not answer, but {wanted} GPUs are wanted"
        return
    if len(found) < wanted:
        yield f"{len(found)} GPUs, {wanted} wanted"
    yield from gpu_findings(found)
    for row in _smi("--query-compute-apps=pid,process_name,used_memory") or []:
        yield f"{NOTE}process {row[0]} ({row[1]}) holds {row[2]} MiB of GPU memory"


def gpu_findings(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """rows: index, MiB in total, MiB used, uncorrected ECC errors ('[N/A]' where ECC is off)."""
    for index, total, used, errors in rows:
        if errors.isdigit() and int(errors):
            yield f"GPU {index}: {errors} uncorrected ECC errors"
        if 1 - int(used) / int(total) < MIN_FREE_GPU_SHARE:
            yield f"GPU {index}: {used} of {total} MiB are in use by another process"


def _smi(query: str) -> list[list[str]] | None:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def check_gpu_arithmetic(gpus: int) -> Iterator[str]:
    """Each GPU multiplies two matrices of small integers: the result is known exactly."""
    import torch

    size = 1024
    for index in range(gpus):
        try:
            ones = torch.ones(size, size, device=f"cuda:{index}", dtype=torch.bfloat16)
            wrong = int((ones @ ones != size).sum())
        except RuntimeError as error:
            yield f"GPU {index}: {' '.join(str(error).split())[:200]}"
            continue
        if wrong:
            yield f"GPU {index}: {wrong} of {size * size} products are wrong"


def pairs(nodes: int) -> list[tuple[int, int]]:
    """Every node with its two neighbours on a ring, in an order in which the pairs of a round share no node."""
    edges = [(left, (left + 1) % nodes) for left in range(nodes if nodes > 2 else nodes - 1)]
    last_is_extra = nodes > 2 and nodes % 2 == 1
    extra = [edges.pop()] if last_is_extra else []
    return [*edges[0::2], *edges[1::2], *extra]


def measure_pairs(nodes: Sequence[str], this: int, port: int, cuda: bool) -> Iterator[str]:
    """All-reduce with each neighbour: notes with the bandwidths. All nodes call it.

    A node that fails with both neighbours is the bad one; an all-reduce over all nodes would only hang.
    """
    problems, rates = [], []
    for number, pair in enumerate(pairs(len(nodes))):
        if this not in pair:
            continue
        other = nodes[pair[1] if this == pair[0] else pair[0]]
        try:
            rate = _all_reduce(nodes[pair[0]], port + number, pair.index(this), cuda)
        except Exception as error:  # whatever it is, it is this pair's finding
            problems.append(f"all-reduce with {other}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            rates.append(f"{NOTE}all-reduce with {other}: {rate / 1e9:.2f} GB/s")
    yield from rates
    yield from (f"{NOTE}{problem}" if rates else problem for problem in problems)


def _all_reduce(address: str, port: int, rank: int, cuda: bool) -> float:
    """Bytes per second of an all-reduce of 16 MiB between two nodes."""
    import torch
    import torch.distributed as dist

    device = "cuda:0" if cuda else "cpu"
    limit = timedelta(seconds=PAIR_SECONDS)
    store = dist.TCPStore(address, port, 2, is_master=rank == 0, timeout=limit)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=2, timeout=limit)
    try:
        values = torch.full((ELEMENTS,), float(rank + 1), device=device)
        dist.all_reduce(values)
        if not bool((values == 3).all()):
            raise ArithmeticError("1 + 2 was not 3 in every element")
        started = time.monotonic()
        for _ in range(REPEATS):
            dist.all_reduce(values)
        float(values[0])  # waits for the device
        return REPEATS * values.nbytes / (time.monotonic() - started)
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Check this node and write its file. Always 0: a bad node must not end the check of the others."""
    parser = argparse.ArgumentParser(prog="node_check", description="check one node of a job")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--token", required=True, help="content of the canary")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--network", action="store_true", help="all-reduce with the neighbours")
    parser.add_argument("--nodes", nargs="+", required=True)
    arguments = parser.parse_args(argv)
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    findings = list(_findings(arguments, name))
    bad = [finding for finding in findings if not finding.startswith(NOTE)]
    file = arguments.folder / f"{name}.{'bad' if bad else 'ok'}"
    try:
        file.write_text("".join(f"{line}\n" for line in findings), encoding="utf-8")
    except OSError as error:
        print(f"mopd: {file}: {error.strerror}", file=sys.stderr)
    return 0


def _findings(arguments: argparse.Namespace, name: str) -> Iterator[str]:
    yield from check_storage(arguments.folder, arguments.token)
    yield from check_software(os.environ.get("MOPD_VERSIONS", ""))
    yield from check_host_memory()
    if arguments.gpus:
        yield from check_gpus(arguments.gpus)
        yield from check_gpu_arithmetic(arguments.gpus)
    if arguments.network and len(arguments.nodes) > 1:
        this = arguments.nodes.index(name)
        yield from measure_pairs(arguments.nodes, this, arguments.port, bool(arguments.gpus))


if __name__ == "__main__":
    sys.exit(main())
