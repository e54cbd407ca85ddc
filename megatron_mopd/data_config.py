"""The part of a run's file that says what is asked: domains and where their prompts come from, and the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.yaml_config import REST, ConfigError, require

Split = Literal["held_out", "validation"]
"""held_out: what is reported · validation: what hyper-parameters are chosen by. Training sees neither."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where a domain's prompts come from: exactly one of a reasoning-gym task or a JSONL file."""

    reasoning_gym: str | None = None
    """Name of a reasoning-gym task; every further key is a parameter of that task."""
    jsonl: str | None = None
    """File of {"prompt" or "messages", "answer"} lines."""
    held_out: str | None = None
    """JSONL file for evaluation; default: the tenth of `jsonl` whose prompts hash to 0 mod 10."""
    validation: str | None = None
    """JSONL file to choose hyper-parameters with; default: the tenth of `jsonl` whose prompts hash to 1 mod 10."""
    params: dict[str, Any] = field(default_factory=dict, metadata=REST)
    """`reasoning_gym`: a parameter of the task."""

    def __post_init__(self) -> None:
        given = [name for name in (self.reasoning_gym, self.jsonl) if name is not None]
        require(len(given) == 1, "give exactly one of reasoning_gym (a task name) and jsonl (a file)")
        if self.jsonl is not None and self.params:
            raise ConfigError(f"unknown key '{next(iter(self.params))}'. Known keys: jsonl, held_out, validation.")
        for name in ("held_out", "validation"):
            if self.jsonl is None and getattr(self, name) is not None:
                raise ConfigError(f"{name}: only beside jsonl; a reasoning_gym task makes its own held-out items")


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    source: SourceSpec
    teacher: str | None = None
    """Key into `teachers`; needed in the `mopd` stage and only there."""
    verifier: Literal["task", "math", "exact", "ifeval", "command", "environment", "none"] = "task"
    """task: the reasoning-gym task's own scorer · math: math-verify · exact: same text · ifeval: instructions of the
    line followed (strict) · command: a program of yours · environment: what the domain's environment says · none: no
    reward."""
    command: tuple[str, ...] = ()
    """`verifier: command`: program and arguments; see domains/command.py for what it reads and writes."""
    command_seconds: float = 600.0
    """`verifier: command`: how long it may take for one batch, by the clock."""
    weight: float = 1.0
    """Share of the prompts of a step (`domain_schedule: sequential`: of the steps), relative to the other domains."""
    max_prompt_tokens: int = 2048
    """Longer prompts are left out and counted, never cut."""
    max_response_tokens: int = 32768
    """Longer answers are cut there, and counted (`truncation_rate`)."""
    wrong_answers: float = 0.0
    """`sft` stage: share of reference answers that are replaced by another item's, to leave RL something to do."""
    system_prompt: str | None = None
    """Put before every prompt of the domain; null: none."""
    environment: EnvironmentSpec | None = None
    """Several turns, with a tool or an agent environment in between; null: one answer."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"weight: must be > 0, got {self.weight}; remove the domain to leave it out")
        require(self.max_prompt_tokens > 0, "max_prompt_tokens: must be > 0")
        require(self.max_response_tokens > 0, "max_response_tokens: must be > 0")
        require(0 <= self.wrong_answers < 1, "wrong_answers: must be in [0, 1)")
        if self.verifier == "task" and self.source.reasoning_gym is None:
            raise ConfigError("verifier: 'task' needs a reasoning_gym source; use math, exact or none with jsonl")
        if self.verifier == "ifeval" and self.source.jsonl is None:
            raise ConfigError("verifier: 'ifeval' needs a jsonl source; `mopd benchmark ifeval` writes one")
        if self.verifier == "environment" and (self.environment is None or self.environment.kind != "http"):
            raise ConfigError("verifier: 'environment' needs an environment of kind http, which gives the reward")
        self._check_command()

    def _check_command(self) -> None:
        wanted = self.verifier == "command"
        if wanted and not (self.command and self.command[0]):
            raise ConfigError("command: missing; verifier 'command' needs a list: [program, argument, ...]")
        require(wanted or not self.command, f"command: only used by verifier 'command', not '{self.verifier}'")
        require(self.command_seconds > 0, f"command_seconds: must be > 0, got {self.command_seconds}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSpec(DomainSpec):
    """A task of the evaluation alone: a benchmark, or an ability outside of the domains. Never trained on."""

    prompts: int | None = None
    """Default: all lines of a JSONL file, `evaluation.prompts` of a reasoning-gym task."""
    samples: int | None = None
    """Answers per prompt, avg@n; default: `evaluation.samples`."""
    temperature: float | None = None
    """Default: `evaluation.temperature`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("teacher", None), ("weight", 1.0), ("wrong_answers", 0.0)):
            require(getattr(self, name) == default, f"{name}: only for domains that are trained on; remove it")
        for name in ("held_out", "validation"):
            require(getattr(self.source, name) is None, f"source.{name}: all of jsonl is evaluated; remove it")
        require(self.verifier != "none", "verifier: 'none' gives no score; name another one")
        require(self.prompts is None or self.prompts >= 1, "prompts: must be >= 1")
        require(self.samples is None or self.samples >= 1, "samples: must be >= 1")
        require(self.temperature is None or self.temperature >= 0, "temperature: must be >= 0 (0 is greedy)")


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    prompts: int = 200
    """Held-out prompts per domain."""
    validation_prompts: int = 0
    """Prompts per domain to choose hyper-parameters with, apart from the held-out ones; 0: no such split."""
    samples: int = 1
    """Answers per prompt: the accuracy is avg@samples."""
    temperature: float = 1.0
    """0 is greedy decoding, one answer per prompt."""
    pass_at: tuple[int, ...] = ()
    """The k of pass@k, each at most `samples`."""
    every: int = 0
    """Steps between evaluations of the domains during training; 0: only `mopd eval`."""
    seed: int = 20260629
    """Of the held-out prompts: the same for every run, so that runs can be compared."""
    perplexity: str | None = None
    """JSONL file of {"text"} lines that training never saw; `mopd eval` reports the perplexity per token."""
    out_of_domain: dict[str, BenchmarkSpec] = field(default_factory=dict)
    """Abilities that no domain trains, so that `mopd eval` shows forgetting."""
    benchmarks: dict[str, BenchmarkSpec] = field(default_factory=dict)
    """Public benchmarks, for `mopd eval`."""

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "prompts: must be >= 1")
        require(self.validation_prompts >= 0, "validation_prompts: must be >= 0 (0 is off)")
        require(self.samples >= 1, "samples: must be >= 1")
        require(self.temperature >= 0, "temperature: must be >= 0 (0 is greedy)")
        require(self.every >= 0, "every: must be >= 0 (0 is off)")
        require(len(set(self.pass_at)) == len(self.pass_at), "pass_at: a number appears twice; keep one")
        for k in self.pass_at:
            require(1 <= k <= self.samples, f"pass_at: {k} is not in 1..samples ({self.samples}); raise samples")
        self._check_greedy("samples", self.samples, self.temperature)
        for group, tasks in (("out_of_domain", self.out_of_domain), ("benchmarks", self.benchmarks)):
            for name, task in tasks.items():
                self._check_greedy(f"{group}.{name}.samples", *self.sampling_of(task))

    def _check_greedy(self, key: str, samples: int, temperature: float) -> None:
        if temperature == 0 and samples != 1:
            raise ConfigError(f"{key}: {samples} greedy answers (temperature 0) would all be the same; set it to 1")

    def sampling_of(self, task: BenchmarkSpec) -> tuple[int, float]:
        """(samples, temperature) of a task, its own or those of the domains."""
        samples = self.samples if task.samples is None else task.samples
        return samples, self.temperature if task.temperature is None else task.temperature
