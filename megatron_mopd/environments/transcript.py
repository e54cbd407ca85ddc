"""A conversation as token ids: only ever appended to, checked against what the engine saw, joined into a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_mopd.types import (
    BoolArray,
    Episode,
    ExpertArray,
    FinishReason,
    FloatArray,
    IntArray,
    Prompt,
    Rollout,
    WeightSpan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What has been said in one episode so far. Every method returns a new one."""

    prompt: Prompt
    sample: int
    token_ids: IntArray
    """[T] the prompt, the student's turns, and what the environment said in between."""
    loss_mask: BoolArray
    """[T] the student's own tokens."""
    rollout_logprobs: FloatArray
    """[T]"""
    turns: tuple[Rollout, ...] = ()
    """As the engine returned them: each one's tokens are the beginning of `token_ids`."""

    @classmethod
    def begin(cls, prompt: Prompt, sample: int) -> Transcript:
        length = len(prompt.token_ids)
        return cls(
            prompt=prompt,
            sample=sample,
            token_ids=prompt.token_ids,
            loss_mask=np.zeros(length, np.bool_),
            rollout_logprobs=np.zeros(length, np.float32),
        )

    @property
    def room(self) -> int:
        """Tokens left of the domain's `max_response_tokens`, which all that follows the prompt shares."""
        return self.prompt.max_response_tokens - (len(self.token_ids) - len(self.prompt.token_ids))

    def question(self, identity: str) -> Prompt:
        """All of it as a prompt to be continued; `identity` seeds the continuation."""
        return replace(self.prompt, id=identity, token_ids=self.token_ids, max_response_tokens=self.room)

    def with_turn(self, answer: Rollout) -> Transcript:
        """`answer` is the engine's continuation of `question`.

        Raises ValueError where the engine did not see exactly these tokens, or says so of others than the new ones.
        """
        before = len(self.token_ids)
        own = np.arange(len(answer.token_ids)) >= before
        if not np.array_equal(answer.token_ids[:before], self.token_ids):
            raise ValueError(f"episode {self.prompt.id}: the rollout engine was not at the tokens that it was given")
        if not np.array_equal(answer.loss_mask, own) or not own.any():
            raise ValueError(f"episode {self.prompt.id}: the rollout engine's mask is not that of its own tokens")
        return replace(
            self,
            token_ids=answer.token_ids,
            loss_mask=np.concatenate((self.loss_mask, own[before:])),
            rollout_logprobs=np.concatenate((self.rollout_logprobs, answer.rollout_logprobs[before:])),
            turns=(*self.turns, answer),
        )

    def with_observation(self, token_ids: IntArray) -> Transcript:
        """Tokens that the student did not write."""
        count = len(token_ids)
        return replace(
            self,
            token_ids=np.concatenate((self.token_ids, token_ids.astype(np.int64))),
            loss_mask=np.concatenate((self.loss_mask, np.zeros(count, np.bool_))),
            rollout_logprobs=np.concatenate((self.rollout_logprobs, np.zeros(count, np.float32))),
        )

    def finish(self, episode: Episode, reason: FinishReason, reward: float) -> Rollout:
        """The episode as one rollout. It ends with a turn of the student's: what came after the last one is dropped."""
        length = len(self.turns[-1].token_ids)
        return Rollout(
            prompt=self.prompt,
            sample=self.sample,
            token_ids=self.token_ids[:length],
            loss_mask=self.loss_mask[:length],
            rollout_logprobs=self.rollout_logprobs[:length],
            policy_version=min(turn.policy_version for turn in self.turns),
            finish_reason=reason,
            weight_versions=join_versions(self.turns),
            routed_experts=join_experts(self.turns, length),
            reward=reward,
            episode=episode,
        )


def join_versions(turns: Sequence[Rollout]) -> tuple[WeightSpan, ...]:
    """Which weights sampled which of the student's own tokens; () where they are the same throughout."""
    spans = []
    for turn in turns:
        length = len(turn.token_ids)
        first = int(np.argmax(turn.loss_mask))
        whole = (WeightSpan(version=turn.policy_version, start=first, end=length),)
        for span in turn.weight_versions or whole:
            start, end = max(span.start, first), min(span.end, length)
            if start < end:
                spans.append(WeightSpan(version=span.version, start=start, end=end))
    return tuple(spans) if len({span.version for span in spans}) > 1 else ()


def join_experts(turns: Sequence[Rollout], length: int) -> ExpertArray | None:
    """[length, MoE layers, k]: a token's row from the first turn that reports it, which is the one that sampled it,
    or, for a turn's last token and the environment's, the one that read it; -1 where none does. None: none at all.

    Raises ValueError where turns report different shapes.
    """
    reported = [turn.routed_experts for turn in turns if turn.routed_experts is not None]
    if not reported:
        return None
    if len({rows.shape[1:] for rows in reported}) > 1:
        raise ValueError(f"routed experts of one episode have shapes {[rows.shape for rows in reported]}")
    joined = np.full((length, *reported[0].shape[1:]), -1, np.int16)
    for rows in reported:
        part = joined[: len(rows)]
        open_rows = (part < 0).all(axis=(1, 2))
        part[open_rows] = rows[: len(part)][open_rows]
    return joined
