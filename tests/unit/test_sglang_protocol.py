"""What goes to `/generate`, and that an answer which is not what was promised is refused in one clear line."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.sampling import stream_key
from megatron_mopd.rollout.sglang.protocol import BadAnswer, Contract, Part, read_answer, request_body
from megatron_mopd.types import Prompt, Rollout, WeightSpan

URL = "http://127.0.0.1:1"
PROMPT = Prompt(id="a/0", domain="a", token_ids=np.array([3, 4, 5]), answer="", max_response_tokens=4)
CONTRACT = Contract(run_id="r1", policy_version=7, vocab_size=50, stop_ids=(1, 2), experts=(2, 2, 8))
ROUTED = np.arange(6 * 2 * 2, dtype=np.int32).reshape(6, 2, 2) % 8


def answer(
    tokens: tuple[int, ...] = (10, 11, 12, 13), reason: Any = "length", experts: np.ndarray | None = ROUTED, **meta: Any
) -> dict[str, Any]:
    routed = {} if experts is None else {"routed_experts": base64.b64encode(experts.tobytes()).decode()}
    return {
        "output_ids": list(tokens),
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[-0.5 - index, token, None] for index, token in enumerate(tokens)],
            "weight_version": "r1:7",
            "weight_versions": [{"version": "r1:7", "start": 0, "end": len(tokens)}],
            **routed,
            **meta,
        },
    }


def read(
    given: Any, contract: Contract = CONTRACT, *, sample: int = 0, kept: Part | None = None, prompt: Prompt = PROMPT
) -> Rollout:
    rollout = read_answer(URL, given, prompt, sample, contract, kept)
    assert isinstance(rollout, Rollout)
    return rollout


def test_an_answer_becomes_a_rollout() -> None:
    rollout = read(answer(), sample=1)

    assert rollout.token_ids.tolist() == [3, 4, 5, 10, 11, 12, 13]
    assert rollout.loss_mask.tolist() == [False] * 3 + [True] * 4
    assert rollout.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -1.5, -2.5, -3.5]
    assert (rollout.sample, rollout.policy_version, rollout.finish_reason) == (1, 7, "length")
    assert rollout.weight_versions == ()
    assert rollout.routed_experts is not None
    assert rollout.routed_experts[:-1].tolist() == ROUTED.tolist()
    assert (rollout.routed_experts[-1] == -1).all()


def test_a_stop_token_belongs_to_the_response() -> None:
    rollout = read(answer((10, 2), "stop", ROUTED[:4]))

    assert rollout.response_ids.tolist() == [10, 2]
    assert rollout.finish_reason == "stop"


def test_a_stop_token_as_the_last_token_allowed_is_a_stop_whatever_the_server_calls_it() -> None:
    assert read(answer((10, 11, 12, 1))).finish_reason == "stop"


def test_without_routed_experts_none_are_read() -> None:
    contract = Contract(run_id="r1", policy_version=7, vocab_size=50, stop_ids=(1, 2))

    assert read(answer(experts=None), contract).routed_experts is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("gateway timeout", "the answer is no rollout"),
        (answer(()), "it has no output_ids"),
        (answer((10, 99, 12, 13)), "token ids 10..99 leave the student's vocabulary of 50"),
        (answer((10, 11, 12), experts=ROUTED[:5]), "only 3 of 4 tokens came"),
        (answer((10, 11, 12, 13, 14)), "5 tokens came, 4 were asked for"),
        (answer(output_token_logprobs=[[-1.0, 10, None]]), "4 tokens came with 1 log-probabilities"),
        (answer(output_token_logprobs=None), "4 tokens came with 0 log-probabilities"),
        (
            answer(output_token_logprobs=[[-1.0, 10], [float("nan"), 11], [-1.0, 12], [-1.0, 13]]),
            "the log-probability of token 1 is nan",
        ),
        (
            answer(output_token_logprobs=[[-1.0, 10], [-1.0, 11], [None, 12], [-1.0, 13]]),
            "the log-probability of token 2 is nan",
        ),
        (answer(output_token_logprobs=[[0.5, t] for t in (10, 11, 12, 13)]), "a log-probability is 0.5, above 0"),
        (answer(output_token_logprobs=[[-1.0, t] for t in (10, 11, 13, 12)]), "are of other tokens"),
        (
            answer((10, 11), "stop", ROUTED[:4]),
            "it stopped at token 11, which is none of the tokenizer's stop tokens 1, 2",
        ),
        (answer((10, 1, 12, 13)), "it went on after the stop token 1"),
        (answer((10, 11), "abort", ROUTED[:4]), "it ended early, without saying more than {'type': 'abort'}"),
        (answer(weight_versions=None, weight_version="default"), "its weights are 'default', not 'r1:7'"),
        (
            answer(weight_versions=[{"version": "r2:7", "start": 0, "end": 4}]),
            "its weights are 'r2:7', not 'r1:7': somebody else changed them",
        ),
        (
            answer(weight_versions=[{"version": "r1:6", "start": 0, "end": 4}]),
            "its weights are of version 6, those of version 7 were sent",
        ),
        (answer(weight_versions=[{"version": "r1:7", "start": 0, "end": 3}]), "cover 3 of 4 tokens"),
        (answer(experts=None), "start the server with --enable-return-routed-experts"),
        (answer(experts=ROUTED[:5]), "its routed_experts have 20 entries, 6 tokens have 24"),
        (answer(experts=ROUTED + 1), "its routed_experts 1..8 are not among the 8 experts"),
    ],
)
def test_a_broken_promise_is_one_line_that_names_server_and_prompt(broken: Any, message: str) -> None:
    with pytest.raises(BadAnswer) as caught:
        read_answer(URL, broken, PROMPT, 0, CONTRACT)

    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{URL}: prompt a/0: ")
    assert "\n" not in str(caught.value)


def test_a_request_depends_on_seed_prompt_and_sample_only() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9)
    bodies = [request_body(PROMPT, sample, sampling, 5, CONTRACT) for sample in (0, 1, 0)]
    seeds = [body["sampling_params"]["sampling_seed"] for body in bodies]

    assert seeds[0] == seeds[2] != seeds[1]
    assert seeds[0] == stream_key(5, "a/0", 0) % 2**63
    assert bodies[0]["input_ids"] == [3, 4, 5]
    params = bodies[0]["sampling_params"]
    assert (params["max_new_tokens"], params["temperature"], params["top_p"], params["top_k"]) == (4, 0.7, 0.9, -1)
    assert params["stop_token_ids"] == [1, 2]
    assert "n" not in params
    assert bodies[0]["return_routed_experts"] is True


LAGGING = replace(CONTRACT, oldest_version=6)
STOPPABLE = replace(LAGGING, may_stop=True)


def span(version: int, start: int, end: int) -> dict[str, Any]:
    return {"version": f"r1:{version}", "start": start, "end": end}


def test_tokens_of_every_version_that_is_allowed_are_told_apart() -> None:
    rollout = read(answer(weight_versions=[span(6, 0, 3), span(7, 3, 4)]), LAGGING)
    assert rollout.policy_version == 6
    assert rollout.weight_versions == (
        WeightSpan(version=6, start=3, end=6),
        WeightSpan(version=7, start=6, end=7),
    )


@pytest.mark.parametrize("version", [5, 8])
def test_a_version_out_of_the_range_is_refused(version: int) -> None:
    with pytest.raises(BadAnswer, match=f"its weights are of version {version}, 6 to 7 were sent"):
        read_answer(URL, answer(weight_versions=[span(6, 0, 3), span(version, 3, 4)]), PROMPT, 0, LAGGING)


def test_a_stopped_answer_is_kept_and_gone_on_with() -> None:
    first = read_answer(
        URL, answer((10, 11), "abort", ROUTED[:4], weight_versions=[span(6, 0, 2)]), PROMPT, 0, STOPPABLE
    )
    assert isinstance(first, Part)
    body = request_body(PROMPT, 0, Sampling(temperature=1.0), 5, STOPPABLE, first)
    assert body["input_ids"] == [3, 4, 5, 10, 11]
    assert body["sampling_params"]["max_new_tokens"] == 2
    whole = request_body(PROMPT, 0, Sampling(temperature=1.0), 5, STOPPABLE)
    assert body["sampling_params"]["sampling_seed"] == whole["sampling_params"]["sampling_seed"]

    later = (ROUTED + 3) % 8  # the server has routed the old tokens anew
    second = read_answer(URL, answer((12,), "abort", later[:5]), PROMPT, 0, STOPPABLE, first)
    assert isinstance(second, Part)
    rollout = read(answer((13,), "length", ROUTED), STOPPABLE, kept=second)
    assert rollout.token_ids.tolist() == [3, 4, 5, 10, 11, 12, 13]
    assert rollout.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -1.5, -0.5, -0.5]
    assert rollout.loss_mask.tolist() == [False] * 3 + [True] * 4
    assert rollout.policy_version == 6
    assert rollout.weight_versions == (
        WeightSpan(version=6, start=3, end=5),
        WeightSpan(version=7, start=5, end=7),
    )
    # The row of a part's last token is the next part's, which read it; the last of all has none.
    assert rollout.routed_experts is not None
    rows = [*ROUTED[:4], later[4], ROUTED[5], np.full((2, 2), -1)]
    assert rollout.routed_experts.tolist() == np.stack(rows).tolist()
    assert rollout.finish_reason == "length"


def test_an_answer_that_was_stopped_at_its_end_is_whole() -> None:
    stop = read(answer((10, 2), "abort", ROUTED[:4]), STOPPABLE)
    assert (stop.finish_reason, stop.response_ids.tolist()) == ("stop", [10, 2])
    assert read(answer(reason="abort"), STOPPABLE).finish_reason == "length"


def test_an_answer_that_was_stopped_before_it_began_keeps_what_there_was() -> None:
    nothing = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "Aborted"}}}
    kept = read_answer(URL, nothing, PROMPT, 0, STOPPABLE)
    assert isinstance(kept, Part)
    assert kept.token_ids.tolist() == [3, 4, 5]
    waiting = answer((10,), {"type": "abort"}, None)
    waiting["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
    assert read_answer(URL, waiting, PROMPT, 0, STOPPABLE, kept) is kept


def test_too_many_tokens_over_all_parts_are_refused() -> None:
    first = read_answer(URL, answer((10, 11, 12), "abort", ROUTED[:5]), PROMPT, 0, STOPPABLE)
    assert isinstance(first, Part)
    with pytest.raises(BadAnswer, match="5 tokens came, 4 were asked for"):
        read_answer(URL, answer((13, 14), "length", ROUTED), PROMPT, 0, STOPPABLE, first)
    with pytest.raises(BadAnswer, match="it went on after the stop token 1"):
        read_answer(URL, answer((1, 14), "abort", ROUTED[:4]), PROMPT, 0, STOPPABLE)
