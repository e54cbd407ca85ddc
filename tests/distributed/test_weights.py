"""Hugging Face -> Megatron -> Hugging Face on real Megatron ranks over gloo, bit by bit, in seven layouts."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megatron_mopd.config import OptimSpec, ParallelSpec
from megatron_mopd.parallel.runtime import World, start_world, stop_world
from megatron_mopd.student.architecture import Architecture, parse_architecture, read_architecture
from megatron_mopd.student.hf_files import INDEX, SINGLE, TensorSpec, content_hash, read_headers, write_model
from megatron_mopd.student.model import build_model
from megatron_mopd.student.optimizer import wrap
from megatron_mopd.student.weight_stream import export_hf, iter_hf
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.student.weights import check_hf, load_hf
from megatron_mopd.yaml_config import ConfigError
from tests.distributed.ranks import run_ranks

VOCAB = 101  # not divisible by 2: one padded row
SHARD_BYTES = 20_000  # several files
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2)]
RAW = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
DENSE = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
VARIANTS = {
    "moe": MOE | {"tie_word_embeddings": False},
    "dense": DENSE | {"tie_word_embeddings": False},
    "moe_tied": MOE | {"tie_word_embeddings": True},
    "dense_tied": DENSE | {"tie_word_embeddings": True},
}


def make_model(folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> Architecture:
    """A folder with config.json and random weights in several files."""
    folder.mkdir(parents=True)
    raw = RAW | VARIANTS[variant] | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(raw))
    arch = parse_architecture(raw, "test")
    generator = torch.Generator().manual_seed(1)
    specs = [TensorSpec(name=t.name, shape=t.shape, dtype=dtype) for t in model_tensors(arch)]
    tensors = ((s.name, torch.randn(s.shape, generator=generator)) for s in specs)
    write_model(folder, specs, tensors, SHARD_BYTES)
    return arch


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for variant in VARIANTS:
        make_model(folder / variant, variant)
    return folder


def _round_trip(layout: tuple[int, int, int], models: Path, out: Path) -> list[str]:
    """Every variant through this layout; returns the names that iter_hf gave, the same on every rank."""
    spec = ParallelSpec(tensor=layout[0], pipeline=layout[1], expert=layout[2])
    world = start_world(spec, seed=1)
    names: list[str] = []
    for variant in VARIANTS:
        arch = read_architecture(models / variant)
        if not arch.is_moe and layout[2] > 1:
            continue
        model = build_model(arch, spec, world, torch.float32, training=False)
        for parameter in model.parameters():
            parameter.detach().fill_(float("nan"))
        load_hf(model, arch, models / variant, world)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        _check_vocabulary(model, arch, world, read_tensors(models / variant))
        expected = read_tensors(models / variant)
        for name, tensor in iter_hf(model, arch, world):
            assert torch.equal(tensor, expected.pop(name)), name
            names.append(f"{variant}/{name}")
        assert not expected
        export_hf(model, arch, world, out / variant, models / variant, max_shard_bytes=SHARD_BYTES)
    stop_world()
    return names


def _check_vocabulary(model: torch.nn.Module, arch: Architecture, world: World, hf: dict[str, Tensor]) -> None:
    """The rows of this tensor rank, padding included, of the embedding and of the output layer."""
    rows = -(-VOCAB // world.tensor.size)
    begin = world.tensor.rank * rows
    embedding = hf["model.embed_tokens.weight"]
    head = embedding if arch.tie_embeddings else hf["lm_head.weight"]
    parameters = dict(model.named_parameters())
    for name, whole in (("embedding.word_embeddings.weight", embedding), ("output_layer.weight", head)):
        if name in parameters:
            own = whole[begin : begin + rows]
            assert torch.equal(parameters[name][: len(own)], own)
            assert parameters[name].shape[0] == rows
            assert (parameters[name][len(own) :] == 0).all()
    assert ("embedding.word_embeddings.weight" in parameters) == world.is_first_stage
    own_head = world.is_last_stage and not (world.is_first_stage and arch.tie_embeddings)
    assert ("output_layer.weight" in parameters) == own_head


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(map(str, layout)))
def test_round_trip_is_bit_identical(layout: tuple[int, int, int], models: Path, tmp_path: Path) -> None:
    tensor, pipeline, expert = layout
    names = run_ranks(_round_trip, pipeline * max(tensor, expert), layout, models, tmp_path, init=False)
    assert all(of_rank == names[0] for of_rank in names)
    for variant in VARIANTS:
        if expert > 1 and "dense" in variant:
            continue
        source, out = models / variant, tmp_path / variant
        assert (out / INDEX).exists()
        assert content_hash(out) == content_hash(source)
        assert {name: (s.dtype, s.shape) for name, s in read_headers(out).items()} == {
            name: (s.dtype, s.shape) for name, s in read_headers(source).items()
        }


def _alone(variant: str, models: Path, out: Path, dtype: torch.dtype, stored_as: torch.dtype | None) -> None:
    world = start_world(ParallelSpec(), seed=1)
    arch = read_architecture(models / variant)
    model = build_model(arch, ParallelSpec(), world, dtype, training=False)
    load_hf(model, arch, models / variant, world)
    export_hf(model, arch, world, out, models / variant, dtype=stored_as)
    stop_world()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_transformers_loads_the_export(variant: str, models: Path, tmp_path: Path) -> None:
    (models / variant / "generation_config.json").write_text('{"eos_token_id": 7}')
    run_ranks(_alone, 1, variant, models, tmp_path, torch.float32, None, init=False)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [SINGLE]
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert exported.dtype == torch.float32
    assert exported.generation_config.eos_token_id == 7
    reference = transformers.AutoModelForCausalLM.from_pretrained(models / variant)
    theirs = reference.state_dict()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    exported.save_pretrained(tmp_path / "resaved")
    arch = read_architecture(tmp_path / "resaved")
    check_hf(arch, tmp_path / "resaved", "model.hf_config")
    assert content_hash(tmp_path / "resaved") == content_hash(models / variant)


def test_dtypes_are_cast_on_load_and_on_export(models: Path, tmp_path: Path) -> None:
    run_ranks(_alone, 1, "moe_tied", models, tmp_path / "out", torch.bfloat16, torch.float32, init=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    expected = read_tensors(models / "moe_tied")
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


def _bfloat16(models: Path) -> None:
    spec = ParallelSpec(tensor=2, pipeline=2, expert=2)
    world = start_world(spec, seed=1)
    arch = read_architecture(models / "moe")
    model = build_model(arch, spec, world, torch.bfloat16, training=False)
    load_hf(model, arch, models / "moe", world)
    expected = read_tensors(models / "moe")
    assert all(torch.equal(t, expected[name].bfloat16()) for name, t in iter_hf(model, arch, world))
    stop_world()


def test_bfloat16_travels_between_ranks(models: Path) -> None:
    run_ranks(_bfloat16, 4, models, init=False)


def _rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    specs = [TensorSpec(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]
    write_model(folder, specs, iter(tensors.items()))


def test_check_names_key_tensor_and_remedy(tmp_path: Path) -> None:
    folder, arch = tmp_path / "model", make_model(tmp_path / "model", "moe")
    check_hf(arch, folder, "model.hf_config")
    tensors = read_tensors(folder)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    bias = {"model.extra.bias": torch.zeros(1)}
    wrong = (
        ({k: v for k, v in tensors.items() if k != name}, rf"'{name}' is missing \(1 in all\)"),
        (tensors | bias, r"'model.extra.bias' is not part of the model \(1 in all\)"),
        (
            tensors | {name: torch.zeros(25, 32)},
            rf"'{name}' has shape \[25, 32\], config.json says \[24, 32\]",
        ),
    )
    for changed, message in wrong:
        _rewrite(folder, changed)
        with pytest.raises(ConfigError, match=rf"^model\.hf_config: .*{message}; use config.json and weights"):
            check_hf(arch, folder, "model.hf_config")


def _load_fails(folder: Path, arch: Architecture) -> tuple[str, bool]:
    world = start_world(ParallelSpec(), seed=1)
    model = build_model(arch, ParallelSpec(), world, torch.float32, training=False)
    for parameter in model.parameters():
        parameter.detach().fill_(1.0)
    with pytest.raises(ConfigError) as caught:
        load_hf(model, arch, folder, world)
    untouched = all(bool((parameter == 1.0).all()) for parameter in model.parameters())
    stop_world()
    return str(caught.value), untouched


def test_a_truncated_file_stops_the_load_before_the_first_copy(tmp_path: Path) -> None:
    folder, arch = tmp_path / "model", make_model(tmp_path / "model", "moe")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    [(message, untouched)] = run_ranks(_load_fails, 1, folder, arch, init=False)
    assert last.name in message
    assert "damaged" in message
    assert untouched


def test_a_stored_output_layer_of_a_tied_model_must_equal_the_embedding(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    arch = make_model(folder, "dense_tied")
    tensors = read_tensors(folder)
    embedding = tensors["model.embed_tokens.weight"]
    _rewrite(folder, tensors | {"lm_head.weight": embedding})
    run_ranks(_alone, 1, "tied", tmp_path, tmp_path / "out", torch.float32, None, init=False)
    assert content_hash(tmp_path / "out") == content_hash(models / "dense_tied")
    _rewrite(folder, tensors | {"lm_head.weight": embedding + 1})
    [(message, _)] = run_ranks(_load_fails, 1, folder, arch, init=False)
    assert "'lm_head.weight' differs from the embedding" in message
    assert "tie_word_embeddings" in message


def _export_fails(models: Path, out: Path) -> str:
    """A first export, then one that hits a limit on the size of files, as a full disk would."""
    spec = ParallelSpec(tensor=2)
    world = start_world(spec, seed=1)
    arch = read_architecture(models / "moe")
    model = build_model(arch, spec, world, torch.float32, training=False)
    load_hf(model, arch, models / "moe", world)
    export_hf(model, arch, world, out, models / "moe")
    for parameter in model.parameters():
        parameter.detach().zero_()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    with pytest.raises(ConfigError) as caught:
        export_hf(model, arch, world, out, models / "moe")
    stop_world()
    return str(caught.value)


def test_a_full_disk_is_an_error_on_every_rank_and_spares_the_old_export(models: Path, tmp_path: Path) -> None:
    messages = run_ranks(_export_fails, 2, models, tmp_path / "out", init=False)
    assert messages[0] == messages[1]
    assert f"{tmp_path / 'out'}: cannot write the model: File too large; make room" in messages[0]
    assert content_hash(tmp_path / "out") == content_hash(models / "moe")
    assert not list((tmp_path / "out").glob(".*"))


def _through_the_wrapper(models: Path) -> None:
    spec = ParallelSpec(tensor=2)
    world = start_world(spec, seed=1)
    arch = read_architecture(models / "moe")
    model = build_model(arch, spec, world, torch.float32, training=True)
    load_hf(model, arch, models / "moe", world)
    wrapped, _ = wrap(model, OptimSpec(lr=1e-3))
    expected = read_tensors(models / "moe")
    for name, tensor in iter_hf(wrapped, arch, world):
        assert torch.equal(tensor, expected.pop(name)), name
        assert not tensor.requires_grad
    assert not expected
    stop_world()


def test_weights_are_read_from_under_data_parallel_and_optimizer(models: Path) -> None:
    run_ranks(_through_the_wrapper, 4, models, init=False)
