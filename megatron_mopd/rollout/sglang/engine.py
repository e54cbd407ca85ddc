"""`RolloutEngine` over SGLang servers, in a program that runs on many ranks: the first one talks, all get their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.parallel.runtime import World
from megatron_mopd.preflight import Inputs
from megatron_mopd.rollout.engine import RolloutFailure, Sampling, check_prompt
from megatron_mopd.rollout.sglang.check import make_run_id, wanted
from megatron_mopd.rollout.sglang.client import Dispatcher, Limits, Request
from megatron_mopd.rollout.sglang.flight import Choose, Flight
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError
from megatron_mopd.rollout.sglang.opening import Say, open_pool
from megatron_mopd.rollout.sglang.protocol import Contract, Part, read_answer, request_body
from megatron_mopd.rollout.sync.push import ServerSync, make_sync, sync_weights
from megatron_mopd.types import Prompt, Rollout


class SglangEngine:
    """Collective: every rank calls `generate` and `load_weights` at the same time.

    With `rollout.lag` prompts are answered while the ranks go on: `begin`, then `take`. Requests are in a thread of
    rank 0 that knows of no other rank; whatever is collective is here, in the thread that calls.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, world: World, say: Say | None = None) -> None:
        """Starts the servers, or finds them, and waits until all are ready. `say` takes a line for the user: print.

        Raises ConfigError on every rank for a server that cannot be used.
        """
        spec = config.rollout.sglang
        assert spec is not None
        say = say or partial(print, flush=True)
        self._world = world
        folder = Path(config.run_dir)
        self._run_id = world.on_main(lambda: make_run_id(folder)) or ""
        self._wanted = wanted(config, inputs.arch, self._run_id)
        self._stop_ids = inputs.tokenizer.stop_ids
        self._rollout, self._sync_spec = config.rollout, spec.sync
        self._version: int | None = None
        self._newest = 0
        """Version of the weights that were sent, or are being sent."""
        if spec.sync.colocated:
            torch.cuda.empty_cache()  # they size their cache by what is free when they start
        self._pool = world.on_main(lambda: open_pool(spec, inputs.model_folder, self._wanted, folder, say))
        self._dispatcher: Dispatcher | None = None
        self._flight: Flight | None = None
        if self._pool is not None:
            limits = Limits(concurrency=spec.concurrency, answer_seconds=spec.answer_seconds, retries=spec.retries)
            self._dispatcher = Dispatcher(self._pool, limits)
            self._flight = Flight(self._dispatcher, self._request_ahead, config.rollout.samples_per_prompt)
        self.sync_metrics: dict[str, float] = {}
        """Of the last `load_weights`: what was sent, and to how many servers."""
        self._sync: ServerSync | None = None
        if world.is_main:
            dtype = getattr(torch, config.model.dtype)
            self._sync = make_sync(
                spec.sync, inputs.arch, dtype, run_id=self._run_id, run_dir=folder, device=world.device
            )

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See `RolloutEngine.generate`; the prompts of all ranks are answered together. Collective.

        Raises RolloutFailure on every rank when no server is left, or one answers what it should not.
        """
        if self._version is None:
            raise ValueError("the rollout engine has no weights; call load_weights first")
        if samples < 1:
            raise ValueError(f"samples: must be >= 1, got {samples}")
        asked: list[list[Prompt]] = self._world.all_gather_objects([_stripped(prompt) for prompt in prompts])
        parts: list[list[Rollout]] | None = None
        problem: Exception | None = None
        if self._dispatcher is not None:
            try:
                parts = self._answer(self._dispatcher, asked, samples, sampling, seed)
            except (RolloutFailure, ValueError, ServerError) as error:
                problem = _for_all_ranks(error)
        problem = self._world.all_gather_objects(problem)[0]
        if problem is not None:
            raise problem
        own = self._world.scatter_objects(parts)
        return [replace(rollout, prompt=prompts[index // samples]) for index, rollout in enumerate(own)]

    def _answer(
        self, dispatcher: Dispatcher, asked: Sequence[Sequence[Prompt]], samples: int, sampling: Sampling, seed: int
    ) -> list[list[Rollout]]:
        """The rollouts of every rank's prompts."""
        for prompt in (prompt for part in asked for prompt in part):
            check_prompt(prompt, self._wanted.arch)
        requests = [
            self._request(prompt, sample, seed, None, sampling)
            for part in asked
            for prompt in part
            for sample in range(samples)
        ]
        rollouts = iter(dispatcher.generate(requests))
        return [[next(rollouts) for _ in range(len(part) * samples)] for part in asked]

    def begin(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        """Have these answered, `rollout.samples_per_prompt` times each, while the ranks go on; and go on with what a
        `take` has stopped. Every rank calls it with the same prompts; nothing waits."""
        for prompt in prompts:
            check_prompt(prompt, self._wanted.arch)
        if self._flight is not None:
            self._flight.resume()
            for prompt, seed in zip(prompts, seeds, strict=True):
                self._flight.begin(_stripped(prompt), seed)

    def take(self, choose: Choose) -> tuple[list[str], list[Rollout]]:
        """Wait for rollouts of `begin`. Returns the ids of the prompts that `choose` took, which is asked on rank 0,
        and this rank's share of their rollouts: those of every world-size-th prompt. Their `prompt` has no answer.

        With `rollout.partial` what is unfinished then is stopped until the next `begin`. Collective. Raises as
        `generate` does.
        """
        ids: list[str] = []
        parts: list[list[Rollout]] | None = None
        problem: Exception | None = None
        if self._flight is not None:
            try:
                rollouts = self._flight.wait(choose)
                if self._rollout.partial:
                    self._flight.stop()
                ids = list(dict.fromkeys(rollout.prompt.id for rollout in rollouts))
                place = {identity: index % self._world.size for index, identity in enumerate(ids)}
                parts = [[r for r in rollouts if place[r.prompt.id] == rank] for rank in range(self._world.size)]
            except (RolloutFailure, ValueError, ServerError) as error:
                problem = _for_all_ranks(error)
        problem, ids = self._world.all_gather_objects((problem, ids))[0]
        if problem is not None:
            raise problem
        own: list[Rollout] = self._world.scatter_objects(parts)
        return ids, own

    @property
    def kept_tokens(self) -> int:
        """Tokens of rollouts that `take` has stopped on their way; 0 on ranks other than the first."""
        return self._flight.kept_tokens if self._flight is not None else 0

    @property
    def policy_version(self) -> int:
        """Of the weights that were loaded last."""
        assert self._version is not None
        return self._version

    def _request_ahead(self, prompt: Prompt, sample: int, seed: int, kept: Part | None) -> Request:
        spec = self._rollout
        sampling = Sampling(temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k)
        return self._request(prompt, sample, seed, kept, sampling)

    def _request(self, prompt: Prompt, sample: int, seed: int, kept: Part | None, sampling: Sampling) -> Request:
        """Its tokens may be of the weights of now, or of any that are sent while it is answered."""
        oldest = self.policy_version

        def read(url: str, answer: object) -> Rollout | Part:
            return read_answer(url, answer, prompt, sample, self._contract(oldest), kept)

        body = request_body(prompt, sample, sampling, seed, self._contract(oldest), kept)
        if self._sync_spec.in_flight != "in_place":
            return Request(body=body, read=read)
        # No update empties the servers' cache, so what other weights have computed goes by another name.
        return Request(body=body, read=read, when_sent=lambda: {"extra_key": f"weights {self._newest}"})

    def _contract(self, oldest: int) -> Contract:
        arch, wanted = self._wanted.arch, self._wanted
        return Contract(
            run_id=self._run_id,
            policy_version=self._newest,
            oldest_version=oldest,
            vocab_size=arch.vocab_size,
            stop_ids=self._stop_ids,
            experts=(arch.num_layers, arch.experts_per_token, arch.num_experts) if wanted.routed_experts else None,
            may_stop=self._rollout.partial,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`. Collective.

        Servers that came back since the last time get them too. One that fails is taken out; that none is left is for
        `generate` to say, so that what has been learnt can be saved. Raises ConfigError on every rank where the weights
        cannot be written (`sync.kind: disk`).
        """
        held = self._dispatcher if self._sync_spec.in_flight == "wait" else None
        if held is not None:
            held.hold()
        self._newest = version
        if self._sync_spec.colocated:
            torch.cuda.empty_cache()  # the servers take back what the update has left
        servers = self._pool.ready_for_weights() if self._pool is not None else []
        self.sync_metrics = {}
        if self._world.any(bool(servers)):
            report = sync_weights(weights, version, self._world, self._sync, servers)
            self.sync_metrics = report.metrics
            if self._pool is not None:
                self._pool.weights_sent(report.synced, report.failed)
        self._version = version
        if held is not None:
            held.release()

    def rest(self) -> None:
        """See `RolloutEngine.rest`: servers on the trainer's devices (`sync.colocated`) give their memory up."""
        if self._sync is not None and self._pool is not None:
            self._pool.weights_sent((), self._sync.release([member.connection for member in self._pool.live]))

    @property
    def connections(self) -> list[ServerConnection]:
        """Of the live servers; none on other ranks than the first."""
        return [member.connection for member in self._pool.live] if self._pool is not None else []

    def close(self) -> None:
        """Stop the servers that were started; give those that were found back."""
        if self._dispatcher is not None:
            self._dispatcher.close()
        if self._sync is not None:
            self._sync.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _for_all_ranks(error: RolloutFailure | ValueError | ServerError) -> Exception:
    """What every rank is told of an error of the first one's."""
    return RolloutFailure(f"rollout.sglang: {error}") if isinstance(error, ServerError) else error


def _stripped(prompt: Prompt) -> Prompt:
    """What the first rank has to know of another one's prompt."""
    return replace(prompt, answer="", record={}, question="")
