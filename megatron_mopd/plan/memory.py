"""GB of one GPU, part by part: what is always there, and what each phase of a step adds. The fullest stage counts."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.layer_blocks import KEPT_ELEMENTS
from megatron_mopd.config import ParallelSpec, RunConfig
from megatron_mopd.parallel.adamw import PIECE
from megatron_mopd.plan.activations import ActivationShape, LayerSpec, activation_bytes, working_bytes
from megatron_mopd.plan.count import ModelCount
from megatron_mopd.plan.rollout_memory import SERVER_FRACTION, in_process_memory
from megatron_mopd.plan.workload import Packing, Workload, pack_longest
from megatron_mopd.yaml_config import ConfigError

GRADIENT_BYTES = 4
"""`grad_reduce_in_fp32`: one fp32 buffer of the whole shard."""
BLOCK_BYTES = {"local": 16 << 20, "transformer_engine": 64 << 20}
"""Logits or their gradient that the loss has at once (kernels/README.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of one pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    teacher_slots: float
    teacher_heads: float
    rollout_weights: float
    rollout_cache: float
    rollout_prefill: float
    teacher_scores: float
    teacher_forward: float
    activations: float
    working: float
    loss: float
    sync: float
    optimizer_step: float
    server_share: float
    """Of what is free when they start, servers on the same GPUs take so much while they answer; 0: there are none."""
    before_update: float
    """Of `always`, what there is before the first update: when the servers start."""

    @property
    def always(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.teacher_slots + self.rollout_weights

    @property
    def phases(self) -> dict[str, float]:
        """What each phase of a step adds to `always`."""
        scored = self.teacher_scores
        return {
            "rollout": self.rollout_cache + self.rollout_prefill,
            "teacher": scored + self.teacher_forward,
            "update": scored + self.teacher_heads + self.loss + self.working + self.activations,
            "optimizer": scored + self.teacher_heads + self.optimizer_step,
            "sync": self.sync,
        }

    @property
    def total(self) -> float:
        return self.always + max(self.phases.values())

    @property
    def update(self) -> float:
        """The student alone, in training: what `plan.measure` measures."""
        training = self.weights + self.gradients + self.optimizer
        return training + max(self.activations + self.loss + self.working, self.optimizer_step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run in one layout on so many ranks: what memory and time are functions of."""

    config: RunConfig
    count: ModelCount
    teachers: tuple[ModelCount, ...]
    """One per teacher."""
    workload: Workload
    parallel: ParallelSpec
    ranks: int
    max_tokens: int
    """Per micro-batch."""
    spec: LayerSpec
    engine_here: bool
    """Whether these ranks also hold a rollout engine."""

    @property
    def itemsize(self) -> int:
        return 4 if self.config.model.dtype == "float32" else 2

    @property
    def data_ranks(self) -> int:
        return self.ranks // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that hold the same dense weights and share their optimizer."""
        return self.data_ranks * self.parallel.context

    @property
    def expert_data_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // (self.parallel.pipeline * self.parallel.expert)

    @property
    def packing(self) -> Packing:
        order: tuple[str | None, ...] = tuple(self.config.teachers) or (None,)
        return pack_longest(self.workload, order, self.data_ranks, self.max_tokens, self.parallel.context)


MOMENT_BYTES = 8
"""AdamW's two, fp32."""


def master_bytes(itemsize: int) -> int:
    """fp32 weights beside bf16 ones."""
    return 0 if itemsize == 4 else 4


def offloaded_bytes(setting: Setting, stage: int) -> float:
    """Moments that a rank of `stage` keeps in host memory; 0 on a CPU, where everything is there."""
    moved = setting.config.optim.offload and setting.spec != "local"
    return MOMENT_BYTES * optimizer_shard(setting, stage) if moved else 0


def optimizer_shard(setting: Setting, stage: int) -> float:
    """Parameters that a rank of `stage` updates."""
    shard = setting.count.shard(setting.parallel, stage)
    return shard.dense / setting.optimizer_ranks + shard.experts / setting.expert_data_ranks


def stage_memory(setting: Setting, packing: Packing, stage: int) -> StageMemory:
    """Bytes of a rank of `stage`; the largest micro-batch, all answers at their longest."""
    config, count, b = setting.config, setting.count, setting.itemsize
    parallel, local = setting.parallel, setting.spec == "local"
    shard = count.shard(parallel, stage)
    shape = ActivationShape(
        parallel=parallel, spec=setting.spec, itemsize=b, tokens=packing.rank_tokens, microbatches=packing.count
    )
    sharded, offloaded = optimizer_shard(setting, stage), offloaded_bytes(setting, stage)
    last = stage == parallel.pipeline - 1
    slots = {teacher.arch: teacher for teacher in setting.teachers}
    in_slot = sum(teacher.shard(parallel, stage).total for teacher in slots.values())
    rollout = in_process_memory(count, setting.workload, config.rollout.batch_size, setting.ranks, b)
    here = setting.engine_here
    layer = max(layer.total for layer in count.layers) * b
    slot_bytes = 0 if local else in_slot * b * config.teacher_memory.buffers
    masters = sharded * master_bytes(b)
    wide = max((teacher.arch.hidden_size for teacher in setting.teachers), default=0)
    return StageMemory(
        weights=shard.total * b,
        gradients=shard.total * GRADIENT_BYTES,
        optimizer=masters + sharded * MOMENT_BYTES - offloaded,
        # On a CPU the slot points into the store of teachers: no memory of its own (it is counted as host memory).
        teacher_slots=slot_bytes,
        teacher_heads=_teacher_heads(setting) if last else 0,
        rollout_weights=rollout.weights if here else 0,
        rollout_cache=rollout.cache if here else 0,
        rollout_prefill=rollout.prefill if here else 0,
        teacher_scores=_score_bytes(setting, wide) * packing.update_rows if last else 0,
        teacher_forward=2 * working_bytes(max(slots, key=lambda a: a.hidden_size), shape) if slots else 0,
        activations=activation_bytes(count.arch, shape, stage),
        working=working_bytes(count.arch, shape),
        loss=_loss_bytes(setting, packing) if last else 0,
        # A layer whole, and the parts it was gathered from; nothing is gathered on a single rank.
        sync=2 * layer if here and setting.ranks > 1 else 0,
        # `parallel/adamw.py`: denominators of everything, or of a piece beside the moments of two.
        optimizer_step=4 * sharded if local else PIECE * (2 * MOMENT_BYTES + 4) if offloaded else 0,
        server_share=0 if local else _server_share(config),
        before_update=shard.total * (b + GRADIENT_BYTES) + masters + slot_bytes,
    )


def fullest(setting: Setting) -> tuple[int, StageMemory]:
    """The pipeline stage whose ranks need most, and what they need."""
    packing = setting.packing
    stages = [stage_memory(setting, packing, stage) for stage in range(setting.parallel.pipeline)]
    return max(enumerate(stages), key=lambda pair: pair[1].total)


def _server_share(config: RunConfig) -> float:
    """`--mem-fraction-static` of colocated servers: of the memory that is free when they start.

    Raises ConfigError where it is no number.
    """
    sglang = config.rollout.sglang
    if sglang is None or sglang.launch is None or not sglang.sync.colocated:
        return 0
    names = [part for argument in sglang.launch.arguments for part in argument.split("=", 1)]
    if "--mem-fraction-static" not in names:
        return SERVER_FRACTION
    given = next(iter(names[names.index("--mem-fraction-static") + 1 :]), "nothing")
    try:
        return float(given)
    except ValueError:
        raise ConfigError(
            f"rollout.sglang.launch.arguments: --mem-fraction-static takes a number, got {given}"
        ) from None


def _teacher_heads(setting: Setting) -> float:
    """`TeacherBank.heads`: every teacher's output layer on the device, for the full-vocabulary loss."""
    if setting.config.objective.kind != "full_vocab" or setting.spec == "local":
        return 0
    tensor, b = setting.parallel.tensor, setting.itemsize
    return sum(-(-t.arch.vocab_size // tensor) * t.arch.hidden_size * b for t in setting.teachers)


def _score_bytes(setting: Setting, hidden: int) -> float:
    """Per trained token: what the bank keeps of a whole update's scores, on every tensor rank."""
    kind = setting.config.objective.kind
    if kind == "full_vocab":
        return hidden * setting.itemsize
    if kind == "teacher_topk":
        return setting.config.objective.top_k * (8 + 4)
    return 4 if setting.teachers else 0


def _loss_bytes(setting: Setting, packing: Packing) -> float:
    """Output layer and loss at the last stage: rows, their gradient, blocks of logits, the weight's gradient."""
    arch, tensor, b = setting.count.arch, setting.parallel.tensor, setting.itemsize
    rows, hidden, part = packing.rows, arch.hidden_size, -(-arch.vocab_size // tensor)
    gathered = packing.rank_tokens * hidden * b if tensor > 1 else 0
    of_rows = rows * hidden * b
    weight = part * hidden * (b if b == 4 else 4 + b)
    sides = 2 if setting.config.objective.kind == "full_vocab" else 1
    if rows * part <= KEPT_ELEMENTS:  # kept: logits of both sides and their gradient
        return gathered + of_rows + rows * part * 4 * (sides + 1)
    gradient = rows * hidden * (4 + b)
    return gathered + of_rows + gradient + weight + BLOCK_BYTES[setting.spec]
