"""The plan's memory beside what torch's allocator gave out, and its checkpoint beside the files of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mopd.config import load_config
from megatron_mopd.parallel.runtime import start_world, stop_world
from megatron_mopd.plan.measure import Peak, measure_update
from megatron_mopd.plan.memory import Setting, fullest
from megatron_mopd.plan.report import checkpoint_bytes
from megatron_mopd.plan.setting import setting_on_cpu
from megatron_mopd.student import checkpoint
from megatron_mopd.student.student import Student
from megatron_mopd.student.weight_stream import export_hf
from tests.distributed.ranks import run_ranks

TINY = Path("configs/tiny/mopd.yaml")


def setting_of(*overrides: str, ranks: int) -> Setting:
    return setting_on_cpu(load_config(TINY, overrides), TINY, None, ranks=ranks)


def measured(setting: Setting) -> list[Peak]:
    def work() -> Peak:
        world = start_world(setting.parallel, 0)
        try:
            return measure_update(setting.config, setting.count.arch, world, setting)
        finally:
            stop_world()

    return run_ranks(work, setting.ranks, init=False)


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ((), 2),
        (("objective.kind=sampled", "optim.max_tokens_per_microbatch=600"), 1),
        (("parallel.recompute=true", "prompts_per_step=900"), 1),
        (("parallel.tensor=2",), 2),
        (("parallel.expert=2", "prompts_per_step=64"), 2),
        (("parallel.context=2",), 2),
    ],
    ids=["tiny", "sampled", "recompute", "tensor", "expert", "context"],
)
def test_peak_is_the_plans(overrides: tuple[str, ...], ranks: int) -> None:
    setting = setting_of(*overrides, ranks=ranks)
    memory = fullest(setting)[1]
    for peak in measured(setting):
        print(f"plan {memory.update / 1e6:.2f} MB, peak {peak.peak / 1e6:.2f} MB: {memory.update / peak.peak - 1:+.1%}")
        assert memory.update == pytest.approx(peak.peak, rel=0.10)
        # What stays: weights, gradients, moments, and the loss's and Megatron's small change.
        held = memory.weights + memory.gradients + memory.optimizer
        if setting.parallel.tensor > 1:  # Megatron keeps the buffer that it gathers a layer's input into
            held += setting.packing.tokens * setting.count.arch.hidden_size * setting.itemsize
        assert held == pytest.approx(peak.held, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_has_the_size_that_is_planned(dtype: str, tmp_path: Path) -> None:
    setting = setting_of(f"model.dtype={dtype}", ranks=1)

    def work() -> int:
        world = start_world(setting.parallel, 0)
        student = Student(setting.config, setting.count.arch, world, None)
        folder = checkpoint.save(
            tmp_path,
            1,
            student.ddp,
            student.optimizer,
            world,
            state={},
            write_model=lambda out: export_hf(student.model, student.arch, world, out, Path("configs/tiny/model")),
            keep_last=1,
        )
        stop_world()
        tensors = [*folder.rglob("*.safetensors"), *folder.rglob("*.distcp")]
        return sum(file.stat().st_size for file in tensors)

    # Headers and alignment, about a kilobyte a stored tensor, are 6 to 8% of a model as small as this.
    written = run_ranks(work, 1, init=False)[0]
    assert checkpoint_bytes(setting) < written < 1.10 * checkpoint_bytes(setting)
