"""Logits of Qwen3 and Qwen3-MoE on Megatron equal those of transformers, in every layout, packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.config import ParallelSpec
from megatron_mopd.packing import pack
from megatron_mopd.parallel import cpu
from megatron_mopd.types import Rollout
from tests import tiny
from tests.distributed.ranks import run_ranks

cpu.install()

LAYOUTS = {  # TP, PP, EP -> world
    (1, 1, 1): 1,
    (2, 1, 1): 2,
    (1, 2, 1): 2,
    (1, 1, 2): 2,
    (2, 1, 2): 4,
    (2, 2, 1): 4,
    (2, 2, 2): 8,
}
MODELS: dict[str, Mapping[str, object]] = {
    "moe": tiny.MOE,
    "moe-tied": {**tiny.MOE, "tie_word_embeddings": True},
    "moe-not-renormalised": {**tiny.MOE, "norm_topk_prob": False},
    "dense": tiny.DENSE,
    "dense-tied": {**tiny.DENSE, "tie_word_embeddings": True},
}


def megatron_logits(parallel: ParallelSpec, folders: list[Path], rollouts: list[Rollout]) -> list[torch.Tensor | None]:
    """[S, V] of each model on ranks of the last stage, else None."""
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.model import build_model, output_weight
    from megatron_mopd.student.step import hidden_rows, run_schedule
    from megatron_mopd.student.weights import load_hf

    world = start_world(parallel, 0)
    result: list[torch.Tensor | None] = []
    batch = pack(
        rollouts,
        None,
        domain_names=("a",),
        aggregation="token",
        multiple_of=world.tensor.size,
        device=world.device,
    )
    for folder in folders:
        arch = read_architecture(folder)
        model = build_model(arch, parallel, world, torch.float32, training=False)
        load_hf(model, arch, folder, world)

        def logits(micro_batch, hidden, model=model, arch=arch):  # type: ignore[no-untyped-def]
            local = hidden_rows(hidden, micro_batch, world) @ output_weight(model).T
            parts = [torch.empty_like(local) for _ in range(world.tensor.size)]
            dist.all_gather(parts, local.contiguous(), group=world.tensor.group)
            return torch.cat(parts, dim=-1)[:, : arch.vocab_size]

        with torch.no_grad():
            outputs = run_schedule(model, [batch], logits, backward=False)
        result.append(outputs[0] if outputs else None)
    stop_world()
    return result


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Rollout], list[torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("logits")
    rollouts = tiny.rollouts(["a"] * 7, seed=5)
    folders, logits = [], []
    for seed, (name, config) in enumerate(MODELS.items()):
        tiny.write_model(root / name, config, seed=seed)
        folders.append(root / name)
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32, attn_implementation="eager")
        rows = []
        with torch.no_grad():
            for rollout in rollouts:
                out = model(torch.from_numpy(rollout.token_ids)[None]).logits[0]
                rows.append(out[:-1][torch.from_numpy(rollout.loss_mask[1:])])
        logits.append(torch.cat(rows))
    return folders, rollouts, logits


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(map(str, layout)))
def test_logits_equal_those_of_transformers(
    layout: tuple[int, int, int], expected: tuple[list[Path], list[Rollout], list[torch.Tensor]]
) -> None:
    folders, rollouts, references = expected
    tp, pp, ep = layout
    parallel = ParallelSpec(tensor=tp, pipeline=pp, expert=ep)
    chosen = [index for index, name in enumerate(MODELS) if ep == 1 or name.startswith("moe")]
    results = run_ranks(megatron_logits, LAYOUTS[layout], parallel, [folders[i] for i in chosen], rollouts, init=False)
    for place, index in enumerate(chosen):
        on_last_stage = [result[place] for result in results if result[place] is not None]
        assert len(on_last_stage) == LAYOUTS[layout] // pp
        for logits in on_last_stage:
            assert logits is not None
            torch.testing.assert_close(logits, references[index], rtol=0, atol=1e-4)
            assert references[index].abs().max() > 1  # not two times nothing
