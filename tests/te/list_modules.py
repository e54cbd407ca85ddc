"""python -m tests.te.list_modules FOLDER: the GPU path's models, made on the meta device, as JSON on stdout.

FOLDER has the unpacked wheel of Transformer Engine. A process of its own, because the stand-in and the belief that
CUDA is there stay for good. One rank, gloo; `build_model` itself, and everything that reads its parameters.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.te import compiled_stand_in

if __name__ == "__main__":
    compiled_stand_in.install(Path(sys.argv[1]))

import torch

from megatron_mopd.config import ModelSpec, ParallelSpec
from megatron_mopd.parallel import cpu

cpu.install()

from megatron.core.transformer.moe import token_dispatcher  # noqa: E402

from megatron_mopd.parallel.runtime import World, start_world, stop_world  # noqa: E402
from megatron_mopd.student.architecture import Architecture, parse_architecture  # noqa: E402
from tests import tiny  # noqa: E402
from tests.qwen3_30b_a3b import CONFIG  # noqa: E402

TINY_MOE = parse_architecture(tiny.MOE | {"num_hidden_layers": 2, "num_experts": 4}, "test")
MODELS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "moe": (TINY_MOE, {}),
    "moe_fp8": (TINY_MOE, {"fp8": "e4m3"}),
    "dense": (parse_architecture(tiny.DENSE | {"num_hidden_layers": 2}, "test"), {}),
    "tied": (dataclasses.replace(parse_architecture(tiny.DENSE, "test"), tie_embeddings=True), {}),
    "qwen3_30b_a3b": (parse_architecture(CONFIG, "test"), {}),
}


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world = start_world(ParallelSpec(), 0)
    token_dispatcher.torch = cpu._TorchOnCpu()  # it says "cuda" where permutations are fused
    # From here on as on a GPU, except that the device is one without memory.
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: "meta"  # type: ignore[assignment, return-value]
    found = {name: describe(arch, options, world) for name, (arch, options) in MODELS.items()}
    # Of the two context ranks only this one is there: enough to construct.
    found["moe_context"] = describe(TINY_MOE, {}, world, ParallelSpec(context=2))
    print(json.dumps(found))
    torch.cuda.is_available = lambda: False
    stop_world()


def describe(
    arch: Architecture, options: dict[str, Any], world: World, parallel: ParallelSpec | None = None
) -> dict[str, Any]:
    from megatron_mopd.student.model import build_model
    from megatron_mopd.student.weights import find_parts

    spec = ModelSpec(hf_config="unused", **options)
    with torch.device("meta"):
        model = build_model(arch, parallel or ParallelSpec(), world, torch.bfloat16, training=True, spec=spec)
    parameters = dict(model.named_parameters())
    sharded = model.sharded_state_dict(metadata={}) if arch.num_experts <= 8 else {}
    return {
        "parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
        "devices": sorted({parameter.device.type for parameter in parameters.values()}),
        "rows": sum(1 for _ in find_parts(model, arch, world).all()),
        "modules": {name: type(module).__name__ for name, module in model.named_modules()} if arch is TINY_MOE else {},
        "sharded": {name: getattr(shard, "key", "") for name, shard in sharded.items()},
        "loads": bool(sharded) and _loads(model, sharded),
        "fp8": [model.config.fp8, model.config.fp8_recipe],
        "context": [getattr(module, "cp_comm_type", None) for module in model.modules() if _is_attention(module)],
    }


def _is_attention(module: torch.nn.Module) -> bool:
    """Whether it is Transformer Engine's core attention, told the context group."""
    return type(module).__name__ == "TEDotProductAttention" and module.cp_group is not None


def _loads(model: torch.nn.Module, sharded: dict[str, Any]) -> bool:
    """Strictly; load_state_dict raises on a key that is missing or not expected."""
    model.load_state_dict({name: shard.data for name, shard in sharded.items()})
    return True


if __name__ == "__main__":
    main()
