"""The embedded rollout engine: each rank decodes its own prompts with its own copy of the student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.rollout.decoder import Decoder
from megatron_mopd.rollout.engine import Sampling, check_prompt
from megatron_mopd.rollout.sampling import draw, stream_key, uniforms
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.types import FinishReason, FloatArray, IntArray, Prompt, Rollout

_COMPACT_SHARE = 0.25
"""Finished rows are dropped from the batch once they are this share of it: dropping copies the cache."""
_CACHE_CHUNK = 512
"""Response tokens that the cache has room for at first; it doubles when they are used up."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One sequence to decode and its place in the result."""

    place: int
    prompt: Prompt
    sample: int


class InProcessEngine:
    """`RolloutEngine` in this process. No collectives: every rank generates its own share of the prompts."""

    def __init__(
        self,
        arch: Architecture,
        *,
        stop_ids: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        """`batch_size`: sequences that are decoded together.

        Raises ValueError for a stop id outside the vocabulary.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: must be >= 1, got {batch_size}")
        for token in stop_ids:
            if not 0 <= token < arch.vocab_size:
                raise ValueError(f"stop_ids: {token} is outside the vocabulary of {arch.vocab_size}")
        self.decoder = Decoder(arch, dtype=dtype, device=device)
        self._batch_size = batch_size
        self._is_stop = torch.zeros(arch.vocab_size, dtype=torch.bool, device=device)
        self._is_stop[list(stop_ids)] = True
        self._version: int | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._version = None
        self.decoder.weights.load(weights)
        self._version = version

    def rest(self) -> None:
        """Keeps its weights: the next load writes into them."""

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        if self._version is None:
            raise ValueError("the rollout engine has no weights; call load_weights first")
        if samples < 1:
            raise ValueError(f"samples: must be >= 1, got {samples}")
        for prompt in prompts:
            check_prompt(prompt, self.decoder.arch)
        jobs = [
            _Job(index * samples + sample, prompt, sample)
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        # Similar lengths decode together; the samples of a prompt stay neighbours and share its prefill.
        jobs.sort(key=lambda job: len(job.prompt.token_ids))
        rollouts: dict[int, Rollout] = {}
        with torch.inference_mode():
            for start in range(0, len(jobs), self._batch_size):
                batch = jobs[start : start + self._batch_size]
                for job, rollout in zip(batch, self._decode(batch, sampling, seed), strict=True):
                    rollouts[job.place] = rollout
        return [rollouts[place] for place in range(len(jobs))]

    def _decode(self, jobs: Sequence[_Job], sampling: Sampling, seed: int) -> Iterator[Rollout]:
        """Decode one batch; yields a rollout per job, in order."""
        device = self.decoder.device
        limits = torch.tensor([job.prompt.max_response_tokens for job in jobs], device=device)
        keys = torch.tensor([stream_key(seed, job.prompt.id, job.sample) for job in jobs], device=device)
        steps = int(limits.max())
        tokens = torch.zeros((len(jobs), steps), dtype=torch.int64, device=device)
        logprobs = torch.zeros((len(jobs), steps), dtype=torch.float32, device=device)
        rows = torch.arange(len(jobs), device=device)
        done = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        groups = [list(group) for _, group in groupby(jobs, key=lambda job: job.place - job.sample)]
        logits, cache = self.decoder.prefill(
            [group[0].prompt.token_ids for group in groups],
            [len(group) for group in groups],
            capacity=min(steps, _CACHE_CHUNK),
        )
        for step in range(steps):
            drawn, drawn_logprobs = draw(logits, uniforms(keys, step), sampling)
            tokens[rows, step], logprobs[rows, step] = drawn, drawn_logprobs
            done |= self._is_stop[drawn] | (limits == step + 1)
            finished = int(done.sum())
            if finished == len(rows):
                break
            if finished >= _COMPACT_SHARE * len(rows):
                alive = (~done).nonzero().squeeze(1)
                rows, keys, limits, done, drawn = (t[alive] for t in (rows, keys, limits, done, drawn))
                cache.keep(alive)
            logits = self.decoder.decode(drawn, cache)
        return self._collect(jobs, tokens, logprobs)

    def _collect(self, jobs: Sequence[_Job], tokens: Tensor, logprobs: Tensor) -> Iterator[Rollout]:
        """Cut each row [steps] at its first stop token or limit: finished rows may have been decoded on."""
        arrays = [tensor.cpu().numpy() for tensor in (tokens, logprobs, self._is_stop[tokens])]
        for job, ids, values, stops in zip(jobs, *arrays, strict=True):
            limit = job.prompt.max_response_tokens
            hits = np.flatnonzero(stops[:limit])
            length = int(hits[0]) + 1 if len(hits) else limit
            yield self._rollout(job, ids[:length], values[:length], "stop" if len(hits) else "length")

    def _rollout(self, job: _Job, response: IntArray, logprobs: FloatArray, reason: FinishReason) -> Rollout:
        prompt = job.prompt
        before = len(prompt.token_ids)
        assert self._version is not None
        return Rollout(
            prompt=prompt,
            sample=job.sample,
            token_ids=np.concatenate((prompt.token_ids, response)),
            loss_mask=np.arange(before + len(response)) >= before,
            rollout_logprobs=np.concatenate((np.zeros(before, dtype=np.float32), logprobs)),
            policy_version=self._version,
            finish_reason=reason,
        )
