"""Who answers the prompts that are trained on, and how: the keys under `rollout`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from megatron_mopd.rollout.sync.config import SyncSpec
from megatron_mopd.yaml_config import ConfigError, require

OWN_ARGUMENTS = (
    "--api-key", "--admin-api-key", "--base-gpu-id", "--device", "--dp", "--dp-size", "--dtype", "--ep", "--ep-size",
    "--host", "--load-format", "--model", "--model-path", "--pp-size", "--port", "--tp", "--tp-size",
    "--weight-version",
)  # fmt: skip
"""Of SGLang's command line, what has a key of its own here, or must be as it is."""


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """SGLang servers that the run starts, watches and stops, on the machine of its first rank."""

    servers: int = 1
    """How many, each with the whole model: data parallelism. Each takes `tensor` GPUs of its own."""
    tensor: int = 1
    """GPUs that share one copy of the model."""
    expert: int = 1
    """Expert parallel ranks, within the tensor parallel ones."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that SGLang is installed in; `make sglang` makes the default one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where this machine has a GPU."""
    first_gpu: int = 0
    """The first server's first GPU; the others follow."""
    host: str = "127.0.0.1"
    """Address that the servers listen on: loopback, or that of the job's own network."""
    port: int | None = None
    """The first server's port, the others take the next ones; default: free ones."""
    arguments: tuple[str, ...] = ()
    """More of SGLang's command line, as in [--mem-fraction-static, "0.8"]."""
    start_seconds: float = 900.0
    """How long a server may take until it answers."""

    def __post_init__(self) -> None:
        for name in ("servers", "tensor", "expert"):
            require(getattr(self, name) >= 1, f"{name}: must be >= 1")
        require(self.tensor % self.expert == 0, "expert: must divide tensor")
        require(self.first_gpu >= 0, "first_gpu: must be >= 0")
        require(self.port is None or 1 <= self.port <= 65536 - self.servers, "port: must be in 1..65535")
        require(self.host not in ("", "0.0.0.0", "::"), "host: name one address, not every network of the machine")
        require(self.start_seconds > 0, "start_seconds: must be > 0")
        for argument in self.arguments:
            name = argument.partition("=")[0]
            require(name not in OWN_ARGUMENTS, f"arguments: {name} is not taken; it is set from the other keys")


@dataclass(frozen=True, kw_only=True)
class SglangSpec:
    """Either `urls` of servers that run already, or `launch`."""

    urls: tuple[str, ...] = ()
    """http://host:port each. They take this run's weights: nobody else may use them."""
    api_key_variable: str = "MOPD_SGLANG_API_KEY"
    """`urls`: the environment variable that holds the servers' API key, if they want one."""
    launch: LaunchSpec | None = None
    sync: SyncSpec = field(default_factory=SyncSpec)
    """How the student's weights reach the servers after every step."""
    concurrency: int = 128
    """Requests that one server has at a time; the others wait here."""
    answer_seconds: float = 1800.0
    """How long one rollout may take; a server that takes longer counts as dead."""
    retries: int = 4
    """How often a server that cannot be reached is asked again, after 0.25, 0.5, 1, ... seconds, until it counts as
    dead. What a server refuses (HTTP 4xx) is not asked again."""

    def __post_init__(self) -> None:
        require(bool(self.urls) != (self.launch is not None), "give either urls or launch")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname or parts.path or parts.query or parts.username:
                raise ConfigError(f"urls: {url!r}: write it as http://host:port")
        require(len(set(self.urls)) == len(self.urls), "urls: the same one twice")
        require(self.concurrency >= 1, "concurrency: must be >= 1")
        require(self.answer_seconds > 0, "answer_seconds: must be > 0")
        require(self.retries >= 0, "retries: must be >= 0")


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    engine: Literal["in_process", "sglang", "dataset"] = "in_process"
    """in_process: the student answers, on-policy · sglang: servers with the student's weights answer, on-policy ·
    dataset: stored answers of the teachers, off-policy."""
    dataset: str | None = None
    """`dataset`: the file that `mopd sample` wrote."""
    sglang: SglangSpec | None = None
    """`sglang`: the servers."""
    routing_replay: Literal["off", "R2", "R3"] = "off"
    """Mixture of experts: which experts a token goes to in the student's passes (arXiv 2510.11370). off: those that its
    routers choose then · R3: those that the servers' routers chose when the token was sampled, or read · R2: those that
    our own routers chose with the weights before the step's first update; one more forward pass of what the later
    updates see, and the same as off with one update a step. Weights of the experts and the routers' gradient are
    always those of the student's present scores; teachers always route freely."""
    samples_per_prompt: int = 1
    """Answers to each prompt; `grpo` compares them with each other."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """1: no limit."""
    top_k: int = 0
    """0: no limit."""
    batch_size: int = 256
    """`in_process`: sequences that one rank decodes together."""
    lag: int = 0
    """`sglang`: how many steps old the weights may be that a token was sampled with, when it is trained on. 0: strictly
    on-policy, servers and trainer take turns · n: the next n steps' answers are sampled meanwhile. Set
    `objective.importance` with it (icepop or tis): the answers are then of another policy than the one that learns."""
    over_sample: float = 1.0
    """`lag`: so many times `prompts_per_step` are begun, and a step ends with the first `prompts_per_step` that are
    answered. The others are not dropped, which would favour short answers, but trained on within `lag` steps."""
    partial: bool = False
    """`over_sample`: answers that a step did not wait for stop where they are and go on in the next step, and nothing
    is sampled during the update. Without it they go on during the update, which takes a `lag` of 2 or more."""
    waves: int = 1
    """`sglang`: in how many parts, at most, the teachers score a step's answers, each as soon as that share of them is
    there, while the servers go on with the longer ones. Every wave swaps each of its teachers in once."""

    @property
    def samples_ahead(self) -> bool:
        """Whether answers are under way while the ranks do something else."""
        return self.lag > 0 or self.waves > 1

    def __post_init__(self) -> None:
        if self.engine == "dataset" and not self.dataset:
            raise ConfigError("dataset: missing; engine 'dataset' needs the file that `mopd sample` wrote")
        if self.engine != "dataset" and self.dataset is not None:
            raise ConfigError(f"dataset: not read by engine '{self.engine}'; set engine: dataset or remove it")
        if self.engine == "sglang" and self.sglang is None:
            raise ConfigError("sglang: missing; engine 'sglang' needs sglang.urls or sglang.launch")
        if self.engine != "sglang" and self.sglang is not None:
            raise ConfigError(f"sglang: not read by engine '{self.engine}'; set engine: sglang or remove it")
        if self.routing_replay == "R3" and self.engine != "sglang":
            raise ConfigError(f"routing_replay: R3 replays what servers report; engine '{self.engine}' reports nothing")
        if self.routing_replay == "R2" and self.engine == "dataset":
            raise ConfigError(
                "routing_replay: R2 is for the student's own answers, not those of a dataset; set it to off"
            )
        self._check_lag()
        self._check_waves()
        require(self.samples_per_prompt >= 1, "samples_per_prompt: must be >= 1")
        require(self.temperature >= 0, "temperature: must be >= 0 (0 is greedy)")
        require(0 < self.top_p <= 1, "top_p: must be in (0, 1]")
        require(self.top_k >= 0, "top_k: must be >= 0 (0 is no limit)")
        require(self.batch_size >= 1, "batch_size: must be >= 1")

    def _check_lag(self) -> None:
        require(self.lag >= 0, f"lag: must be >= 0 (0 is on-policy), got {self.lag}")
        require(1.0 <= self.over_sample <= 2.0, f"over_sample: must be in [1, 2], got {self.over_sample:g}")
        if self.lag and self.engine != "sglang":
            raise ConfigError(
                f"lag: {self.lag}, but engine '{self.engine}' cannot sample while the ranks train; "
                "set engine: sglang, or lag: 0"
            )
        if self.partial and self.over_sample == 1:
            raise ConfigError("partial: nothing is left unfinished with over_sample 1; raise that, or remove partial")
        needed = 1 if self.partial else 2
        if self.over_sample > 1 and self.lag < needed:
            raise ConfigError(
                f"over_sample: what a step leaves is trained on later, which needs lag >= {needed}"
                f"{'' if self.partial else ' (1 with partial: true)'}, got {self.lag}; raise lag, or set it to 1"
            )
        overlaps = self.lag > 0 and not self.partial
        if self.sglang is not None and self.sglang.sync.in_flight != "retract" and not overlaps:
            raise ConfigError(
                "sglang.sync.in_flight: no answer is under way during an update with lag 0 or partial; remove it"
            )
        if self.sglang is not None and self.sglang.sync.colocated and overlaps:
            raise ConfigError(
                f"lag: {self.lag}, but servers on the trainer's devices (sglang.sync.colocated) cannot sample while it "
                "trains; set over_sample and partial: true, or lag: 0"
            )

    def _check_waves(self) -> None:
        require(self.waves >= 1, f"waves: must be >= 1, got {self.waves}")
        if self.waves == 1:
            return
        if self.engine != "sglang":
            raise ConfigError(
                f"waves: {self.waves}, but engine '{self.engine}' has a step's answers all at once; "
                "set engine: sglang, or waves: 1"
            )
        if self.over_sample > 1:
            raise ConfigError("waves: over_sample already ends a step with the answers that come first; set one to 1")
        if self.sglang is not None and self.sglang.sync.colocated:
            raise ConfigError(
                "waves: servers on the trainer's devices (sglang.sync.colocated) cannot sample while the teachers "
                "score; set waves: 1"
            )
