"""What is sent to `/generate` for one rollout, and how its answer becomes one: all that is promised is checked."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.sampling import stream_key
from megatron_mopd.rollout.sglang.http import ServerError
from megatron_mopd.rollout.sync.version import num_updates_of, weight_version
from megatron_mopd.types import ExpertArray, FinishReason, FloatArray, IntArray, Prompt, Rollout, WeightSpan

_POSITIVE = (1 << 63) - 1


class BadAnswer(ServerError):
    """A server answered with something other than what was asked for. Asking again would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What every answer of a batch must keep to."""

    run_id: str
    policy_version: int
    """Of the newest weights that a token may be of."""
    vocab_size: int
    stop_ids: tuple[int, ...]
    experts: tuple[int, int, int] | None = None
    """(MoE layers, experts per token, experts) where the routed experts are asked for."""
    oldest_version: int | None = None
    """Of the oldest weights that a token may be of; None: `policy_version` alone."""
    may_stop: bool = False
    """Whether an answer may have been ended by us on its way: it is a `Part` then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rollout that was ended on its way, to be continued later. T: tokens of the prompt and of the answer so far."""

    token_ids: IntArray
    """[T]"""
    logprobs: FloatArray
    """[T]; 0 in the prompt."""
    spans: tuple[WeightSpan, ...] = ()
    """Of the answer's tokens, in order and without a gap."""
    experts: ExpertArray | None = None
    """[T, MoE layers, k], the last row -1; None where they are not asked for, or nothing is answered yet."""

    @classmethod
    def nothing(cls, prompt: Prompt) -> Self:
        return cls(token_ids=prompt.token_ids, logprobs=np.zeros(len(prompt.token_ids), dtype=np.float32))

    def continued(self, more: Part) -> Part:
        """With what a request for the rest has brought: `more` begins with these tokens.

        Their own experts stay, for they are of the weights that they were sampled with; but the row of the last one,
        which was not an input yet. Spans of the same version become one.
        """
        before, spans = len(self.token_ids), [*self.spans]
        for span in more.spans:
            if spans and spans[-1].version == span.version:
                spans[-1] = replace(spans[-1], end=span.end)
            else:
                spans.append(span)
        experts = more.experts
        if self.experts is not None and experts is not None:
            experts = np.concatenate((self.experts[: before - 1], experts[before - 1 :]))
        return Part(
            token_ids=more.token_ids,
            logprobs=np.concatenate((self.logprobs, more.logprobs[before:])),
            spans=tuple(spans),
            experts=experts,
        )


def request_body(
    prompt: Prompt, sample: int, sampling: Sampling, seed: int, contract: Contract, kept: Part | None = None
) -> dict[str, Any]:
    """The body of POST /generate for one rollout, or for the rest of one of which there is `kept`.

    The server's randomness is of the seed and a token's place in the whole sequence: with the same weights a rollout in
    parts is the rollout in one.

    Each sample is a request of its own: with n > 1 the server gives all of them the same seed. The seed is derived as
    in the in-process engine, so that a rollout depends on (seed, prompt.id, sample) only. Stop tokens are ours alone;
    the server's own end-of-sequence token is one of them, or its answer is refused.
    """
    before = prompt.token_ids if kept is None else kept.token_ids
    return {
        "input_ids": before.tolist(),
        "sampling_params": {
            "max_new_tokens": prompt.max_response_tokens + len(prompt.token_ids) - len(before),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(contract.stop_ids),
            "skip_special_tokens": False,
            "sampling_seed": stream_key(seed, prompt.id, sample) & _POSITIVE,
        },
        "return_logprob": True,
        "return_routed_experts": contract.experts is not None,
    }


def read_answer(
    url: str, answer: Any, prompt: Prompt, sample: int, contract: Contract, kept: Part | None = None
) -> Rollout | Part:
    """The rollout in an answer of `/generate`, after the tokens of `kept`; a `Part` where the contract says that it may
    be stopped, and it was. Raises BadAnswer, with one line that names the server and the prompt.

    The server's log-probabilities are log softmax(logits / temperature) before top-p and top-k, and those of
    temperature 1 where it decodes greedily: what `RolloutEngine.generate` promises, so nothing is converted.
    """
    try:
        return _read(answer, prompt, sample, contract, kept or Part.nothing(prompt))
    except _Broken as broken:
        raise BadAnswer(url, f"prompt {prompt.id}: {broken}") from None


class _Broken(Exception):
    """What is wrong with an answer."""


def _read(answer: Any, prompt: Prompt, sample: int, contract: Contract, kept: Part) -> Rollout | Part:
    if not isinstance(answer, Mapping) or not isinstance(answer.get("meta_info"), Mapping):
        raise _Broken(f"the answer is no rollout: {str(answer)[:80]!r}")
    meta: Mapping[str, Any] = answer["meta_info"]
    stopped = contract.may_stop and _kind(meta) == "abort"
    if stopped and (not answer.get("output_ids") or "waiting queue" in str(meta["finish_reason"].get("message"))):
        # Before its first token; or while it waited for room again, when not all of it is reported: nothing new.
        return kept
    tokens = _tokens(answer.get("output_ids"), contract)
    logprobs = _logprobs(meta.get("output_token_logprobs"), tokens)
    before, total = len(kept.token_ids), len(kept.token_ids) + len(tokens)
    spans, token_ids = _spans(meta, before, total, contract), np.concatenate((kept.token_ids, tokens))
    response = token_ids[len(prompt.token_ids) :]
    # A stopped answer may have come to its end with its last token.
    ends = bool(np.isin(response, contract.stop_ids).any()) or len(response) >= prompt.max_response_tokens
    over = ends or not stopped
    reason = _finish("length" if stopped else _kind(meta), meta, response, prompt, contract) if over else None
    more = Part(
        token_ids=token_ids,
        logprobs=np.concatenate((np.zeros(before, dtype=np.float32), logprobs)),
        spans=spans,
        experts=_experts(meta, total, contract) if contract.experts else None,
    )
    whole = kept.continued(more)
    if reason is None:
        return whole
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=token_ids,
        loss_mask=np.arange(total) >= len(prompt.token_ids),
        rollout_logprobs=whole.logprobs,
        policy_version=min(span.version for span in whole.spans),
        finish_reason=reason,
        weight_versions=whole.spans if len(whole.spans) > 1 else (),
        routed_experts=whole.experts,
    )


def _kind(meta: Mapping[str, Any]) -> str | None:
    reason = meta.get("finish_reason")
    return reason.get("type") if isinstance(reason, Mapping) else None


def _tokens(value: Any, contract: Contract) -> IntArray:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _Broken("it has no output_ids")
    tokens = np.asarray(value)
    if tokens.dtype.kind != "i" or tokens.ndim != 1:
        raise _Broken("its output_ids are not a list of token ids")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= contract.vocab_size:
        raise _Broken(f"token ids {low}..{high} leave the student's vocabulary of {contract.vocab_size}")
    return tokens.astype(np.int64)


def _logprobs(value: Any, tokens: IntArray) -> FloatArray:
    """[len(tokens)] from [log-probability, token id, text] per token."""
    given = len(value) if isinstance(value, Sequence) else 0
    if given != len(tokens):
        raise _Broken(f"{len(tokens)} tokens came with {given} log-probabilities")
    logprobs = np.array([np.nan if entry[0] is None else entry[0] for entry in value], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        where = int(np.flatnonzero(~np.isfinite(logprobs))[0])
        raise _Broken(f"the log-probability of token {where} is {logprobs[where]}")
    if (logprobs > 1e-3).any():
        raise _Broken(f"a log-probability is {logprobs.max():.3g}, above 0")
    if [entry[1] for entry in value] != tokens.tolist():
        raise _Broken("its log-probabilities are of other tokens than its output_ids")
    return logprobs


def _finish(
    kind: str | None, meta: Mapping[str, Any], tokens: IntArray, prompt: Prompt, contract: Contract
) -> FinishReason:
    limit = prompt.max_response_tokens
    stops = np.isin(tokens, contract.stop_ids)
    if kind not in ("stop", "length"):
        raise _Broken(f"it ended early, without saying more than {meta.get('finish_reason')}")
    if stops[:-1].any():
        raise _Broken(f"it went on after the stop token {tokens[stops][0]}")
    if len(tokens) > limit:
        raise _Broken(f"{len(tokens)} tokens came, {limit} were asked for")
    if kind == "stop" and not stops[-1]:
        raise _Broken(
            f"it stopped at token {tokens[-1]}, which is none of the tokenizer's stop tokens "
            f"{', '.join(map(str, contract.stop_ids))}; start the server with the student's own generation_config.json"
        )
    if kind == "length" and not stops[-1] and len(tokens) < limit:
        raise _Broken(f"only {len(tokens)} of {limit} tokens came, without a stop token: is its context too short?")
    return "stop" if stops[-1] else "length"


def _spans(meta: Mapping[str, Any], before: int, total: int, contract: Contract) -> tuple[WeightSpan, ...]:
    """Of the rollout's tokens [before, total), in order and without a gap."""
    given = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": total - before},
    ]
    spans, at = [], 0
    for span in given:
        version = _version(str(span["version"]), contract)
        if span["start"] != at or span["end"] <= at:
            raise _Broken("its weight_versions have gaps")
        at = span["end"]
        spans.append(WeightSpan(version=version, start=before + span["start"], end=before + span["end"]))
    if at != total - before:
        raise _Broken(f"its weight_versions cover {at} of {total - before} tokens")
    return tuple(spans)


def _version(text: str, contract: Contract) -> int:
    try:
        version = num_updates_of(text, contract.run_id)
    except ValueError:
        expected = weight_version(contract.run_id, contract.policy_version)
        raise _Broken(f"its weights are '{text}', not '{expected}': somebody else changed them") from None
    newest = contract.policy_version
    oldest = newest if contract.oldest_version is None else contract.oldest_version
    if not oldest <= version <= newest:
        sent = f"those of version {newest} were sent" if oldest == newest else f"{oldest} to {newest} were sent"
        raise _Broken(f"its weights are of version {version}, {sent}")
    return version


def _experts(meta: Mapping[str, Any], total: int, contract: Contract) -> ExpertArray:
    """[total, layers, k]; the last token was never an input, so that the server has no row for it: -1."""
    assert contract.experts is not None
    layers, k, count = contract.experts
    try:
        flat = np.frombuffer(base64.b64decode(meta["routed_experts"], validate=True), dtype=np.int32)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise _Broken("it comes without routed_experts; start the server with --enable-return-routed-experts") from None
    if flat.size != (total - 1) * layers * k:
        raise _Broken(
            f"its routed_experts have {flat.size} entries, {total - 1} tokens have {(total - 1) * layers * k}"
        )
    if flat.size and (flat.min() < 0 or flat.max() >= count):
        raise _Broken(f"its routed_experts {flat.min()}..{flat.max()} are not among the {count} experts")
    experts = np.full((total, layers, k), -1, dtype=np.int16)
    experts[:-1] = flat.reshape(total - 1, layers, k)
    return experts
