"""`mopd plan`: what is counted, what is computed by hand, and what the README of the H100 configurations says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_mopd.config import ParallelSpec, RunConfig, load_config
from megatron_mopd.plan.activations import ActivationShape, activation_bytes, in_flight, kept_by_layer
from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.compute import step_flops
from megatron_mopd.plan.count import ModelCount, built_shard, count_model
from megatron_mopd.plan.decoding import Engine, answer_lengths, copy_seconds, generation_seconds
from megatron_mopd.plan.faults import host_teacher_bytes, warnings_of
from megatron_mopd.plan.memory import Setting, fullest, stage_memory
from megatron_mopd.plan.published import published, student_shapes
from megatron_mopd.plan.report import checkpoint_bytes
from megatron_mopd.plan.rollout_memory import cache_bytes_per_token, in_process_memory, server_memory
from megatron_mopd.plan.setting import make_setting
from megatron_mopd.plan.simulate import simulate, splits
from megatron_mopd.plan.suggest import distinct, fewest_gpus, layouts, search, verify
from megatron_mopd.plan.traffic import flows
from megatron_mopd.plan.workload import pack_longest, workload_of
from megatron_mopd.student.architecture import Architecture, parse_architecture
from tests.tiny import DENSE, MOE

ROOT = Path(__file__).parents[2]
H100 = ROOT / "configs/qwen3_30b_a3b"
TINY_MOE = parse_architecture(MOE, "tiny")
TINY_DENSE = parse_architecture(DENSE, "tiny")


@cache
def count(arch: Architecture) -> ModelCount:
    return count_model(arch, whole=False)


def setting_of(file: Path, *overrides: str, ranks: int, servers: bool = False) -> Setting:
    config = load_config(file, overrides)
    student = student_shapes(config, file, None)
    cpu = config.model.dtype == "float32"
    counts = {student.arch: count(student.arch)}
    return make_setting(config, counts, student, ranks=ranks, workload=workload_of(config), on_cpu=cpu, servers=servers)


def h100(*overrides: str, ranks: int = 64, servers: bool = True) -> Setting:
    """Without servers, answers come from the engine in the process."""
    if not servers:
        overrides = (*overrides, "rollout.engine=in_process", "rollout.sglang=null", "rollout.routing_replay=off")
    return setting_of(H100 / "mopd.yaml", *overrides, ranks=ranks, servers=servers)


# Counting


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704),
        ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520),
        ("1t-a32b", 1_042_174_423_296, 32_068_579_584),
    ],
)
def test_parameters_of_published_models(name: str, parameters: int, active: int) -> None:
    found = count(published(name).arch)
    assert (found.parameters, found.active_parameters) == (parameters, active)


@pytest.mark.parametrize("arch", [TINY_MOE, TINY_DENSE, replace(TINY_MOE, tie_embeddings=True)])
def test_one_layer_many_times_is_the_whole_model(arch: Architecture) -> None:
    assert replace(count_model(arch), built_layers=1) == count(arch)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [((1, 1, 1), 1), ((2, 2, 2), 4), ((1, 2, 4), 8), ((2, 1, 8), 8), ((1, 4, 1), 4), ((2, 1, 4), 16)],
)
def test_shards_are_those_that_megatron_builds(layout: tuple[int, int, int], ranks: int, tied: bool) -> None:
    arch = replace(TINY_MOE, tie_embeddings=tied)
    parallel = ParallelSpec(tensor=layout[0], pipeline=layout[1], expert=layout[2])
    for stage in range(parallel.pipeline):
        assert built_shard(arch, parallel, ranks, stage) == count(arch).shard(parallel, stage)


def test_dense_shards_with_a_padded_vocabulary() -> None:
    parallel = ParallelSpec(tensor=2)  # 101 rows: one of padding
    assert built_shard(TINY_DENSE, parallel, 2, 0) == count(TINY_DENSE).shard(parallel, 0)
    assert count(TINY_DENSE).experts == 0
    assert count(TINY_DENSE).active_parameters == count(TINY_DENSE).parameters


# Memory


def test_the_readmes_figures_for_64_and_8_gpus() -> None:
    """configs/qwen3_30b_a3b/README.md, by hand: 4.02e9 parameters a rank."""
    memory = {ranks: stage_memory(s := h100(ranks=ranks, servers=False), s.packing, 0) for ranks in (64, 8)}
    for ranks, optimizer in ((64, 5.7), (8, 45.9)):
        parts = memory[ranks]
        assert parts.weights / 1e9 == pytest.approx(8.04, abs=0.01)
        assert parts.gradients / 1e9 == pytest.approx(16.07, abs=0.01)
        assert parts.optimizer / 1e9 == pytest.approx(optimizer, abs=0.05)
        assert parts.teacher_slots == parts.weights
        assert parts.rollout_weights == 2 * 30_532_122_624
    assert cache_bytes_per_token(published("qwen3-30b-a3b").arch, 2) == 2 * 48 * 4 * 128 * 2 == 98_304


def test_the_engines_cache_while_it_doubles() -> None:
    setting = h100(servers=False)
    found = in_process_memory(setting.count, setting.workload, 2, 64, 2)
    # Room for 8192 + 512 tokens, doubled until 65,536 fit; the last copy has 1.25 of that for a moment.
    assert found.slots == 8704 * 8 == 69_632
    assert found.cache == round(1.25 * 2 * 69_632 * 98_304)
    short = workload_of(load_config(ROOT / "configs/tiny/mopd.yaml"))
    assert in_process_memory(setting.count, short, 1000, 2, 2).cache == 128 * (24 + 512) * 98_304  # never grows


def test_a_server_has_what_the_weights_leave() -> None:
    setting = h100()
    one, four, eight = (server_memory(setting.count, setting.workload, n, 80e9, 2) for n in (1, 4, 8))
    assert one.cache == pytest.approx(0.88 * 80e9 - 2 * 30_532_122_624)
    assert one.tokens == pytest.approx(one.cache / 98_304)
    assert four.tokens == pytest.approx(4 * four.cache / 98_304)
    assert eight.tokens == pytest.approx(4 * eight.cache / 98_304)  # 4 key/value heads: the rest are copies


def test_recomputation_keeps_the_input_of_every_layer() -> None:
    arch = published("qwen3-30b-a3b").arch
    parallel = ParallelSpec(tensor=4, expert=8, recompute=True)
    shape = ActivationShape(parallel=parallel, spec="transformer_engine", itemsize=2, tokens=65_536, microbatches=85)
    layer = sum(kept.bytes for kept in kept_by_layer(arch, "transformer_engine", 2, 4))
    final_norm = (2 * 2048 * 2 + 4) / 4
    assert activation_bytes(arch, shape, 0) == pytest.approx(65_536 * (48 * 2048 * 2 / 4 + layer + final_norm))
    # By hand: two norms, qkv twice, result, k = 8 inputs of experts and 3 x 768 each, router and scales.
    by_hand = 2 * (4 * 2048 + 2 * 5120 + 4096 + 8 * (2048 + 3 * 768)) + 4 * (1 + 36 + 32 + 1) + 9 * 128 + 8 * 8
    assert layer == pytest.approx(by_hand / 4)
    kept = replace(shape, parallel=replace(parallel, recompute=False))
    assert activation_bytes(arch, kept, 0) == pytest.approx(65_536 * (48 * layer + final_norm))


@pytest.mark.parametrize(("stage", "microbatches", "held"), [(0, 8, 4), (3, 8, 1), (1, 2, 2), (0, 1, 1)])
def test_micro_batches_in_flight(stage: int, microbatches: int, held: int) -> None:
    assert in_flight(ParallelSpec(pipeline=4), stage, microbatches) == held


def test_full_vocabulary_scores_grow_with_the_answers_and_are_on_every_tensor_rank() -> None:
    """The bank keeps an update's hidden states: rows of a data rank x 2048 x 2 bytes."""
    sampled, full = h100(), h100("objective.kind=full_vocab")
    rows = full.packing.update_rows
    assert stage_memory(full, full.packing, 0).teacher_scores == rows * 2048 * 2
    assert stage_memory(sampled, sampled.packing, 0).teacher_scores == rows * 4
    assert rows >= 2048 * (0.7 * 30_720 + 0.3 * 57_344) / 16 * 0.99
    two = h100("teacher_memory.buffers=2")
    assert stage_memory(two, two.packing, 0).teacher_slots == 2 * stage_memory(two, two.packing, 0).weights
    heads = stage_memory(full, full.packing, 0).teacher_heads
    assert heads == 3 * (151_936 // 4) * 2048 * 2


def test_only_what_generates_or_is_evaluated_holds_an_engine() -> None:
    engines = {name: setting_of(H100 / f"{name}.yaml", ranks=64).engine_here for name in ("sft", "teacher_math")}
    assert engines == {"sft": False, "teacher_math": False}  # servers answer
    assert h100(servers=False).engine_here
    assert not h100(servers=True).engine_here


def test_host_memory_and_checkpoint() -> None:
    setting = h100()
    assert host_teacher_bytes(setting, 8) == 3 * 8 * 2 * 4_018_747_392
    assert checkpoint_bytes(setting) == 16 * 30_532_122_624


def test_too_much_memory_is_told_with_a_remedy() -> None:
    engine, servers = h100(servers=False), h100()
    cluster = ClusterSpec(gpus=64, host_memory_gb=100)
    told = warnings_of(engine, cluster, fullest(engine)[1])
    assert "is more than 90%; the in-process engine keeps a whole student" in told[0]
    assert told[1].startswith("host memory: the teachers take 192.9 GB of a node's 100 GB")
    assert warnings_of(servers, ClusterSpec(gpus=64), fullest(servers)[1]) == []
    small = warnings_of(servers, ClusterSpec(gpus=64, rollout_gpus=8, gpu_memory_gb=64), fullest(servers)[1])
    assert small == [
        "rollout servers: a copy has room for 0 tokens, one answer may take 65,536; raise --rollout-tensor"
    ]


# Work


def test_packing_is_that_of_a_step() -> None:
    workload = workload_of(load_config(ROOT / "configs/tiny/mopd.yaml"))
    assert [domain.rollouts for domain in workload.domains] == [85, 86, 85]
    packing = pack_longest(workload, ("math", "reverse", "sort"), 2, 8192)
    assert (packing.count, packing.tokens, packing.rows) == (3, 43 * 40, 43 * 16)
    assert packing.update_rows == 43 * (12 + 12 + 16)
    halves = pack_longest(workload, ("math", "reverse", "sort"), 2, 900)
    assert (halves.count, halves.tokens) == (6, 22 * 40)


def test_mean_lengths_come_from_the_runs_own_log(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/tiny/mopd.yaml", [f"run_dir={tmp_path}"])
    assumed = workload_of(config)
    assert (assumed.lengths_how, assumed.domains[0].response) == ("assumed", 6)
    line = '{{"step": {}, "kind": "train", "response_tokens/math": {}, "response_tokens/reverse": 4.0}}\n'
    (tmp_path / "metrics.jsonl").write_text(line.format(0, 7.0) + line.format(1, 9.0))
    measured = workload_of(config)
    assert measured.lengths_how == "measured"
    assert [domain.response for domain in measured.domains] == [8.0, 4.0, 8.0]  # sort was not logged: assumed
    given = workload_of(config, 0.25)
    assert (given.lengths_how, given.domains[0].response) == ("given", 3.0)


def test_flops_are_six_per_parameter_and_token() -> None:
    setting = h100("parallel.recompute=false")
    work, body = setting.workload, setting.count.body
    assert body == 3_353_032_704 - 2 * 151_936 * 2048 - 2048
    attention = 4 * 32 * 128 * 48 * work.attended
    product = 2 * work.response_tokens * 151_936 * 2048
    found = step_flops(setting)
    assert found.update == pytest.approx(3 * (2 * body * work.tokens + attention) + 4 * product)
    assert found.teacher == pytest.approx(2 * body * work.tokens + attention + product)
    assert found.rollout == found.teacher
    again = step_flops(h100("parallel.recompute=true"))
    assert again.update == pytest.approx(4 * (2 * body * work.tokens + attention) + 4 * product)
    full = step_flops(h100("objective.kind=full_vocab", "parallel.recompute=false"))
    assert full.update - found.update == pytest.approx(2 * product)
    assert found.teacher - full.teacher == pytest.approx(product)


def test_bytes_that_a_step_moves() -> None:
    setting, cluster = h100("parallel.pipeline=2", ranks=128), ClusterSpec(gpus=128, rollout_gpus=8)
    found = {flow.key: flow for flow in flows(setting, cluster)}
    tokens, layers = setting.workload.tokens / 16, 24
    assert found["tensor_parallel"].bytes == pytest.approx(7 * layers * tokens * 2048 * 2 * 3 / 4)
    assert found["expert_all_to_all"].bytes == pytest.approx(6 * layers * tokens / 4 * 8 * 2048 * 2 * 7 / 8)
    assert found["expert_all_to_all_teacher"].bytes == pytest.approx(found["expert_all_to_all"].bytes / 3)
    assert found["pipeline"].bytes == pytest.approx(2 * tokens / 4 * 2048 * 2)
    shard = setting.count.shard(setting.parallel, 0)
    assert found["data_parallel"].bytes == pytest.approx(6 * shard.dense * 15 / 16)
    assert found["expert_data_parallel"].bytes == pytest.approx(6 * shard.experts * 7 / 8)
    assert found["teacher_swaps"].bytes == 3 * 2 * shard.total
    assert found["teacher_swaps"].seconds == pytest.approx(3 * 2 * shard.total / 64e9)
    assert found["weight_sync"].bytes == 2 * 30_532_122_624
    links = {key: flow.link for key, flow in found.items()}
    assert links["tensor_parallel"] == links["expert_all_to_all"] == "NVLink"
    assert links["data_parallel"] == links["pipeline"] == links["weight_sync"] == "network"


def test_context_ranks_share_tokens_and_optimizer_and_send_keys_and_values() -> None:
    whole, shared = (h100("parallel.tensor=2", f"parallel.context={c}", ranks=64) for c in (1, 4))
    one, four = (stage_memory(setting, setting.packing, 0) for setting in (whole, shared))
    assert (whole.data_ranks, shared.data_ranks) == (32, 8)
    assert four.activations == pytest.approx(one.activations / 4)
    assert (four.weights, four.optimizer) == (one.weights, one.optimizer)
    assert shared.packing.rank_tokens == shared.packing.tokens / 4 == 65536 / 4
    assert shared.packing.rows == 65536 / 4  # the middle of the longest answer: a row for every token
    before, after = ({flow.key: flow for flow in flows(s, ClusterSpec(gpus=64))} for s in (whole, shared))
    tokens = whole.workload.tokens / 32  # of one rank, with 8 x 4 ranks as with 32
    assert after["tensor_parallel"].bytes == pytest.approx(before["tensor_parallel"].bytes)
    assert after["data_parallel"].bytes == pytest.approx(before["data_parallel"].bytes)
    around = tokens * 3 * (2 * 4 * 128 / 2) * 2 * 48
    assert "context_parallel" not in before
    assert after["context_parallel"].bytes == pytest.approx((2 + 2) * around)  # forward again with recomputation
    assert after["context_parallel_teacher"].bytes == pytest.approx(around)
    assert after["context_parallel"].link == "NVLink"


def test_nothing_is_sent_where_nobody_is() -> None:
    alone = setting_of(ROOT / "configs/tiny/mopd.yaml", "parallel.ranks=1", ranks=1)
    assert flows(alone, ClusterSpec(gpus=1, device="cpu")) == ()
    one = h100("parallel.tensor=1", "parallel.expert=1", ranks=1)
    assert {flow.key for flow in flows(one, ClusterSpec(gpus=1))} == {"teacher_swaps"}


# Time


def engine(sequences: int, *, refills: bool, copies: int = 1) -> Engine:
    """One byte a second and endless arithmetic: seconds are bytes."""
    return Engine(
        count=count(TINY_DENSE),
        itemsize=1,
        gpus=1,
        sequences=sequences,
        refills=refills,
        copies=copies,
        flops_per_second=1e30,
        bytes_per_second=1.0,
    )


def test_decoding_reads_weights_and_cache_token_by_token() -> None:
    weights = count(TINY_DENSE).parameters - 101 * 48  # the embedding is looked up
    per_token = 2 * 4 * 2 * 16
    one = copy_seconds(engine(1, refills=False), [(10, 3)])
    assert one == pytest.approx(3 * weights + (10 + 11.5 - 10) * 3 * per_token + 0 * per_token, rel=1e-9)
    assert one == pytest.approx(3 * weights + sum(10 + t + 0.5 for t in range(3)) * per_token)
    pair = copy_seconds(engine(2, refills=False), [(10, 3), (10, 3)])
    assert pair == pytest.approx(3 * weights + 2 * sum(10.5 + t for t in range(3)) * per_token)


def test_servers_refill_and_the_process_waits_for_the_longest() -> None:
    weights = count(TINY_DENSE).parameters - 101 * 48
    answers = [(0, 4), (0, 1), (0, 3)]
    server, process = (copy_seconds(engine(2, refills=flag), answers) for flag in (True, False))
    assert round(server / weights) == 4  # the third takes the second's place
    assert round(process / weights) == 4 + 3
    two = generation_seconds(engine(1, refills=True, copies=2), answers)
    assert round(two / weights) == 4 + 3


def test_few_rows_of_the_process_read_every_expert() -> None:
    moe = replace(engine(1, refills=False), count=count(TINY_MOE))
    dense = count(TINY_MOE).parameters - 101 * 48 - count(TINY_MOE).experts
    assert moe.token_seconds(1, 0) == dense + count(TINY_MOE).experts
    server = replace(moe, refills=True)
    assert server.token_seconds(1, 0) == pytest.approx(dense + count(TINY_MOE).experts / 4)
    assert server.token_seconds(2, 0) == pytest.approx(dense + count(TINY_MOE).experts * (1 - 0.75**2))


def test_answers_have_the_mean_and_the_limit_of_their_domain() -> None:
    workload = workload_of(load_config(H100 / "mopd.yaml"), 0.2)
    answers = answer_lengths(workload, 0)
    assert len(answers) == 2048
    assert max(length for _, length in answers) <= 57_344
    mean = sum(length for _, length in answers) / 2048
    assert mean == pytest.approx(0.2 * (0.7 * 30_720 + 0.3 * 57_344), rel=0.05)
    assert answers == answer_lengths(workload, 0) != answer_lengths(workload, 1)


def test_on_policy_waits_and_a_lag_overlaps() -> None:
    generation = [10.0] * 12
    strict = simulate(generation, train=6, sync=1, lag=0)
    assert strict.step_seconds == pytest.approx(17)
    assert (strict.train_idle, strict.rollout_idle) == (pytest.approx(11 / 17), pytest.approx(7 / 17))
    lagging = simulate(generation, train=6, sync=1, lag=1)
    assert lagging.step_seconds == pytest.approx(11)  # answers, and the sync that interrupts them
    slow = simulate(generation, train=30, sync=1, lag=1)
    assert slow.step_seconds == pytest.approx(30, abs=1.01)
    assert slow.train_idle < 0.05
    together = simulate(generation, train=6, sync=1, lag=0, colocated=True)
    assert together.step_seconds == 17


def test_splits_are_ordered_and_leave_out_the_impossible() -> None:
    def seconds(train: int, rollout: int) -> tuple[list[float], float, float] | None:
        return None if train == 1 else ([30 / rollout] * 12, 62 / train, 0.0)

    found = splits(4, 1, seconds)
    assert [(split.train_nodes, split.rollout_nodes) for split in found] == [(3, 1), (2, 2)]
    assert found[0].timeline.step_seconds == pytest.approx(30, rel=1e-3)  # three train, and wait for answers
    assert found[1].timeline.step_seconds == pytest.approx(31, rel=1e-3)  # two train for longer
    assert found[1].gpu_seconds_share == pytest.approx((2 * 31 + 2 * 15) / (4 * 31), abs=0.01)


# Layouts


def test_layouts_are_valid_and_complete() -> None:
    found = list(layouts(TINY_MOE, 4, 8, longest=4096))
    assert all(4 % (each.tensor * each.pipeline) == 0 for each in found)
    shapes = {(each.tensor, each.pipeline, each.expert) for each in found}
    assert shapes == {(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (1, 4, 1), (2, 1, 1), (2, 1, 2), (2, 1, 4),
                      (2, 2, 1), (2, 2, 2)}  # fmt: skip
    assert {each.expert for each in layouts(TINY_DENSE, 8, 8, longest=4096)} == {1}
    assert {each.context for each in found} == {1}  # too short to be shared out
    longer = {(each.tensor, each.context) for each in layouts(TINY_MOE, 4, 8, longest=16384)}
    assert longer == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)}


def test_suggestions_for_128_gpus_fit_and_can_be_built() -> None:
    cluster = ClusterSpec(gpus=128)
    found = search(h100(ranks=128), cluster)
    fitting = [each for each in found if each.fits]
    assert fitting == found[: len(fitting)] and len(fitting) > 20
    assert all(each.memory_gb + 4 <= 72 for each in fitting)
    assert [each.seconds for each in fitting] == sorted(each.seconds for each in fitting)
    for each in distinct(found, 3):
        verify(each.setting)


def test_eight_h100s_need_offload_and_sixteen_or_eight_h200s_do_not() -> None:
    base = h100(ranks=8)
    cluster = ClusterSpec(gpus=8)
    found = search(base, cluster)
    assert found and not found[0].fits
    verify(found[0].setting)
    assert fewest_gpus(base, cluster) == 16
    assert search(base, ClusterSpec(gpus=8, device="h200"))[0].fits
    config = replace(base.config, optim=replace(base.config.optim, offload=True))
    moved = search(replace(base, config=config), cluster)
    assert moved[0].fits
    verify(moved[0].setting)
    by_layout = {each.setting.parallel: each.memory_gb for each in found}
    least = min(by_layout[each.setting.parallel] - each.memory_gb for each in moved if each.setting.max_tokens == 65536)
    assert least > 29  # of 30.5: 8 bytes a parameter on 8 GPUs; pieces of them come back


def test_a_wrong_count_does_not_pass() -> None:
    setting = h100(ranks=64)
    wrong = replace(setting.count, final_norm=1)
    with pytest.raises(RuntimeError, match="Megatron builds"):
        verify(replace(setting, count=wrong))


# Every file


def runs() -> list[Path]:
    """All run files below configs/."""
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    return [file for file in files if "stage:" in file.read_text()]


@pytest.mark.parametrize("file", runs(), ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_run_loads_plans_and_validates(file: Path) -> None:
    config: RunConfig = load_config(file)
    ranks = config.parallel.ranks or config.parallel.default_ranks
    setting = setting_of(file, ranks=ranks)
    verify(setting)
    memory = fullest(setting)[1]
    assert memory.total > memory.weights > 0
    assert step_flops(setting).update > 0
