"""Everything that can be found wrong before any work starts: files, shapes, tokenizers, data, the layout.

Each mistake is one `ConfigError` that names the key or the file and the remedy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_mopd.config import DomainSpec, ModelSpec, RunConfig, Split, check_layout
from megatron_mopd.domains.command import check_command
from megatron_mopd.domains.dataset import Dataset
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.environment import gpu_count
from megatron_mopd.environments.opening import check_environment
from megatron_mopd.evaluation.documents import read_windows
from megatron_mopd.hub import MANIFEST, MODEL_FOLDER, resolve_folder
from megatron_mopd.rollout.sglang.check import check_servers
from megatron_mopd.run_identity import check_kept_out
from megatron_mopd.student.architecture import Architecture, check_architecture, read_architecture
from megatron_mopd.student.checkpoint_files import read_manifest
from megatron_mopd.student.weights import check_hf
from megatron_mopd.tokenizer import Tokenizer, difference
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a configuration's names stand for on this machine."""

    arch: Architecture
    tokenizer: Tokenizer
    model_folder: Path
    """config.json and the tokenizer."""
    weights: Path | None
    """The student's initial weights; None: random ones."""
    teachers: Mapping[str, tuple[Architecture, Path]]
    dataset: Dataset | None
    """The stored answers that `rollout.engine: dataset` learns from."""


def resolve_inputs(config: RunConfig) -> Inputs:
    """Find the student's and the teachers' folders and read their small files. Raises ConfigError."""
    key = "model.hf_config" if config.model.hf_config else "model.checkpoint"
    model_folder = resolve_folder(config.model.source, key)
    checkpoint = config.model.checkpoint
    weights = resolve_folder(checkpoint, "model.checkpoint") if checkpoint else None
    arch = read_architecture(model_folder)
    if weights is not None and read_architecture(weights) != arch:
        raise ConfigError(f"model: hf_config {model_folder} and checkpoint {weights} are different architectures")
    tokenizer = Tokenizer.load(model_folder)
    teachers = {}
    for name, teacher in config.teachers.items():
        if teacher.checkpoint == "self":
            if weights is None:
                raise ConfigError(f"teachers.{name}.checkpoint: 'self' needs model.checkpoint, the student's start")
            teachers[name] = (arch, weights)
        else:
            folder = resolve_folder(teacher.checkpoint, f"teachers.{name}.checkpoint")
            teachers[name] = (read_architecture(folder), folder)
    return Inputs(
        arch=arch,
        tokenizer=tokenizer,
        model_folder=model_folder,
        weights=weights,
        teachers=teachers,
        dataset=_open_dataset(config, tokenizer, arch.vocab_size),
    )


def _open_dataset(config: RunConfig, tokenizer: Tokenizer, vocab_size: int) -> Dataset | None:
    if config.rollout.dataset is None:
        return None
    dataset = Dataset.load(Path(config.rollout.dataset), vocab_size)
    dataset.check(config.domains, tokenizer)
    return dataset


def check(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError for whatever would stop `config` on `world_size` ranks."""
    check_layout(config.parallel, world_size)
    check_gpu_packages(config.model)
    check_context(config)
    inputs = resolve_inputs(config)
    check_architecture(inputs.arch, config.parallel)
    _check_replay(config, inputs.arch)
    _check_vocabulary(config, inputs)
    _check_teachers(config, inputs)
    _check_weights(inputs)
    _check_lengths(config, inputs.arch)
    _check_data(config, inputs.arch, inputs.tokenizer, dataset=inputs.dataset)
    check_writable(Path(config.run_dir), "run_dir")
    if config.teacher_memory.folder is not None:
        check_writable(Path(config.teacher_memory.folder), "teacher_memory.folder")
    check_servers(config, inputs.arch)


def check_gpu_packages(model: ModelSpec) -> None:
    """Raise ConfigError where `model` asks for what only a package can do that is not installed here."""
    if model.fp8 is not None and find_spec("transformer_engine") is None:
        raise ConfigError(
            f"model.fp8: '{model.fp8}' needs a GPU and Transformer Engine, which is not installed; "
            "pip install '.[gpu]' where the CUDA toolkit is, or remove it"
        )
    if model.gradient_accumulation_fusion and find_spec("fused_weight_gradient_mlp_cuda") is None:
        raise ConfigError(
            "model.gradient_accumulation_fusion: NVIDIA's apex with its CUDA extensions is not installed; build it "
            "(APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . in github.com/NVIDIA/apex) "
            "or set it to false"
        )


def check_context(config: RunConfig) -> None:
    """Raise ConfigError for several context ranks on GPUs in fp32, which no attention of Transformer Engine's takes."""
    if config.parallel.context > 1 and config.model.dtype == "float32" and gpu_count():
        raise ConfigError(
            f"parallel.context: {config.parallel.context} on GPUs needs bfloat16, model.dtype is float32; "
            "set model.dtype: bfloat16 or parallel.context: 1"
        )


def check_evaluation(config: RunConfig, checkpoint: str, world_size: int, split: Split) -> None:
    """Raise ConfigError for whatever would stop `mopd eval`: it needs the checkpoint and the domains, no teacher."""
    check_layout(config.parallel, world_size)
    folder = resolve_folder(checkpoint, "--checkpoint")
    arch = read_architecture(folder)
    if config.evaluation.perplexity is not None:  # the only part that goes through Megatron
        check_architecture(arch, config.parallel, "the checkpoint's")
    check_hf(arch, folder, "--checkpoint")
    if folder.name == MODEL_FOLDER and (folder.parent / MANIFEST).is_file():
        check_kept_out(read_manifest(folder.parent).state["run"], config, split)
    _check_lengths(config, arch)
    _check_data(config, arch, Tokenizer.load(folder), split=split)


def check_beforehand(config: RunConfig, model_folder: Path, world_size: int) -> None:
    """Raise ConfigError for what can be known of a run whose weights and datasets are still to be made.

    `model_folder` has the config.json and the tokenizer that they will have.
    """
    check_layout(config.parallel, world_size)
    arch = read_architecture(model_folder)
    check_architecture(arch, config.parallel)
    _check_replay(config, arch)
    _check_lengths(config, arch)
    if config.rollout.engine != "dataset":
        _check_data(config, arch, Tokenizer.load(model_folder))


def _check_replay(config: RunConfig, arch: Architecture) -> None:
    mode = config.rollout.routing_replay
    if mode != "off" and not arch.is_moe:
        raise ConfigError(f"rollout.routing_replay: {mode}, but the student's model has no experts; set it to off")


def _check_vocabulary(config: RunConfig, inputs: Inputs) -> None:
    highest, limit = max(*inputs.tokenizer.vocabulary.values(), *inputs.tokenizer.stop_ids), inputs.arch.vocab_size
    if highest >= limit:
        raise ConfigError(
            f"{inputs.model_folder}: the tokenizer or generation_config.json has token id {highest}, config.json's "
            f"vocab_size is {limit}; use the model's own tokenizer"
        )
    if config.objective.kind == "teacher_topk" and config.objective.top_k > limit:
        raise ConfigError(
            f"objective.top_k: {config.objective.top_k} is more than the {limit} tokens of the vocabulary; lower it"
        )


def _check_teachers(config: RunConfig, inputs: Inputs) -> None:
    for name, (arch, folder) in inputs.teachers.items():
        key = f"teachers.{name}.checkpoint"
        if arch.vocab_size != inputs.arch.vocab_size:
            raise ConfigError(
                f"{key}: its vocabulary has {arch.vocab_size} tokens, the student's {inputs.arch.vocab_size}; "
                "a teacher may differ in depth and width, not in vocabulary"
            )
        check_architecture(arch, config.parallel, f"teachers.{name}'s")
        told_apart = difference(inputs.tokenizer, Tokenizer.load(folder))
        if told_apart:
            raise ConfigError(f"{key}: {told_apart}; use a teacher trained from the student's SFT checkpoint")


def _check_weights(inputs: Inputs) -> None:
    if inputs.weights is not None:
        check_hf(inputs.arch, inputs.weights, "model.checkpoint")
    for name, (arch, folder) in inputs.teachers.items():
        check_hf(arch, folder, f"teachers.{name}.checkpoint")


def _check_lengths(config: RunConfig, arch: Architecture) -> None:
    for place, domain in _places(config).items():
        longest = domain.max_prompt_tokens + domain.max_response_tokens
        if longest > arch.max_positions:
            raise ConfigError(
                f"{place}: max_prompt_tokens {domain.max_prompt_tokens} + max_response_tokens "
                f"{domain.max_response_tokens} exceed the model's {arch.max_positions} positions; lower them"
            )


def _check_data(
    config: RunConfig,
    arch: Architecture,
    tokenizer: Tokenizer,
    *,
    split: Split = "held_out",
    dataset: Dataset | None = None,
) -> None:
    mixer = DomainMixer(config, tokenizer, dataset)
    mixer.check()
    mixer.split(config.domain_names[0], split)
    if config.evaluation.perplexity is not None:
        read_windows(Path(config.evaluation.perplexity), arch, tokenizer)
    for place, domain in _places(config).items():
        check_command(place, domain)
        check_environment(place, domain.environment, tokenizer)


def _places(config: RunConfig) -> dict[str, DomainSpec]:
    """Everything with prompts, by its key in the configuration."""
    groups: dict[str, Mapping[str, DomainSpec]] = {
        "domains": config.domains,
        "evaluation.out_of_domain": config.evaluation.out_of_domain,
        "evaluation.benchmarks": config.evaluation.benchmarks,
    }
    return {f"{group}.{name}": spec for group, specs in groups.items() for name, spec in specs.items()}


def check_writable(folder: Path, key: str) -> None:
    """Raise ConfigError, which names `key`, where nothing can be written into `folder`, or it cannot be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass  # asking for the permission is not enough: root has it everywhere, also in /proc
    except OSError as error:
        reason = f"{existing}: {error.strerror}"
        raise ConfigError(f"{key}: {folder} cannot be written ({reason}); choose another folder") from None
