"""What is sent to `/generate` for one rollout, and how its answer becomes one: all that is promised is checked."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    vocab_size: int
    stop_ids: tuple[int, ...]
    experts: tuple[int, int, int] | None = None
    """(MoE layers, experts per token, experts) where the routed experts are asked for."""


def request_body(prompt: Prompt, sample: int, sampling: Sampling, seed: int, contract: Contract) -> dict[str, Any]:
    """The body of POST /generate for one rollout.

    Each sample is a request of its own: with n > 1 the server gives all of them the same seed. The seed is derived as
    in the in-process engine, so that a rollout depends on (seed, prompt.id, sample) only. Stop tokens are ours alone;
    the server's own end-of-sequence token is one of them, or its answer is refused.
    """
    return {
        "input_ids": prompt.token_ids.tolist(),
        "sampling_params": {
            "max_new_tokens": prompt.max_response_tokens,
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


def read_answer(url: str, answer: Any, prompt: Prompt, sample: int, contract: Contract) -> Rollout:
    """The rollout in an answer of `/generate`. Raises BadAnswer, with one line that names the server and the prompt.

    The server's log-probabilities are log softmax(logits / temperature) before top-p and top-k, and those of
    temperature 1 where it decodes greedily: what `RolloutEngine.generate` promises, so nothing is converted.
    """
    try:
        return _read(answer, prompt, sample, contract)
    except _Broken as broken:
        raise BadAnswer(url, f"prompt {prompt.id}: {broken}") from None


class _Broken(Exception):
    """What is wrong with an answer."""


def _read(answer: Any, prompt: Prompt, sample: int, contract: Contract) -> Rollout:
    if not isinstance(answer, Mapping) or not isinstance(answer.get("meta_info"), Mapping):
        raise _Broken(f"the answer is no rollout: {str(answer)[:80]!r}")
    meta: Mapping[str, Any] = answer["meta_info"]
    tokens = _tokens(answer.get("output_ids"), contract)
    logprobs = _logprobs(meta.get("output_token_logprobs"), tokens)
    before, total = len(prompt.token_ids), len(prompt.token_ids) + len(tokens)
    spans = _spans(meta, before, total, contract)
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=np.concatenate((prompt.token_ids, tokens)),
        loss_mask=np.arange(total) >= before,
        rollout_logprobs=np.concatenate((np.zeros(before, dtype=np.float32), logprobs)),
        policy_version=min(span.version for span in spans),
        finish_reason=_finish(meta, tokens, prompt, contract),
        weight_versions=spans if len(spans) > 1 else (),
        routed_experts=_experts(meta, total, contract) if contract.experts else None,
    )


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


def _finish(meta: Mapping[str, Any], tokens: IntArray, prompt: Prompt, contract: Contract) -> FinishReason:
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, Mapping) else None
    limit = prompt.max_response_tokens
    stops = np.isin(tokens, contract.stop_ids)
    if kind not in ("stop", "length"):
        raise _Broken(f"it ended early, without saying more than {reason}")
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
    if version != contract.policy_version:
        raise _Broken(f"its weights are of version {version}, those of version {contract.policy_version} were sent")
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
