"""Episodes with the Python tool over a real server, on two ranks: what it saw and sampled is what is trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mopd.config import RunConfig
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.packing import pack_step, plan_step
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.rollout.sglang import engine as sglang_engine
from megatron_mopd.routing_exchange import deliver_experts
from megatron_mopd.types import Rollout
from megatron_mopd.yaml_config import build
from tests.distributed.ranks import run_ranks
from tests.distributed.test_environments import contexts_of, contexts_sampled, facts, tool_run
from tests.sglang.trainer_side import Trainer, response_logprobs, run_file, served_logprobs

SECONDS = 900


def _collect(config: RunConfig) -> dict[str, Any]:
    """A step's rollouts, what is packed of them, and what was sent to the server and came back."""
    sent: list[tuple[int, ...]] = []
    answers: list[Rollout] = []
    make_body = sglang_engine.request_body

    def noting_body(*args: Any, **options: Any) -> dict[str, Any]:
        body = make_body(*args, **options)
        sent.append(tuple(body["input_ids"]))
        return body

    sglang_engine.request_body = noting_body  # this process is a fork of the test's
    trainer = Trainer(config)
    generate = trainer.engine.generate

    def noting_answers(*args: Any, **options: Any) -> list[Rollout]:
        given = generate(*args, **options)
        answers.extend(given)
        return given

    trainer.engine.generate = noting_answers  # type: ignore[method-assign]
    trainer.send(0)
    world, tokenizer = trainer.world, trainer.inputs.tokenizer
    rollouts = Collector(config, DomainMixer(config, tokenizer), trainer.engine, tokenizer, world).collect(0)
    plans = plan_step(rollouts, config, data_ranks=world.data.size)
    batches = pack_step(
        deliver_experts(rollouts, plans, world.all_gather_objects(world.data.rank), world),
        config,
        data_rank=world.data.rank,
        data_ranks=world.data.size,
        multiple_of=world.tensor.size,
        device=world.device,
    )
    played = [rollout for rollout in rollouts if rollout.domain == "a"]
    logits, routed = trainer.view(played)
    apart = np.abs(response_logprobs(played, logits, 1.0) - served_logprobs(played))
    rows = [
        (rollout.routed_experts[:-1], own[:-1])
        for rollout, own in zip(played, routed, strict=True)
        if rollout.routed_experts is not None
    ]
    trainer.close()
    return {
        "rollouts": [facts(rollout) for rollout in rollouts],
        "trained": contexts_of(batches),
        "sent": Counter(sent),
        "questions": Counter(tuple(r.token_ids[: int(r.loss_mask.argmax())].tolist()) for r in answers),
        "sampled": contexts_sampled(answers),
        "difference": float(apart.max()),
        "routing": [bool((np.sort(theirs, -1) == np.sort(ours, -1)).all()) for theirs, ours in rows],
    }


def test_what_the_server_saw_is_what_is_trained_on(models: Path, tmp_path: Path) -> None:
    tree = tool_run(models, tmp_path / "run", ranks=2)
    served = run_file(models, tmp_path / "run", launch={"servers": 1}, sync={"kind": "disk"})["rollout"]
    tree["rollout"] |= served
    first, second = run_ranks(_collect, 2, build(RunConfig, tree), init=False, timeout=SECONDS)

    episodes = [rollout[-1] for rollout in first["rollouts"] if rollout[-1] is not None]
    turns = Counter(episode[0] for episode in episodes)
    trained = first["trained"] + second["trained"]
    print(
        "episodes by turns:", dict(turns), "trained tokens:", trained.total(), "log-probs apart:", first["difference"]
    )
    assert first["rollouts"] == second["rollouts"]
    assert turns[2] + turns[3] >= 6
    assert second["sent"].total() == 0  # the first rank alone talks to the server
    assert first["sent"] == first["questions"] + second["questions"]
    assert trained == first["sampled"] + second["sampled"]
    # The student, with the whole episode in one pass, agrees with the server, which had it turn by turn.
    assert first["difference"] < 1e-4
    # Each rank has the experts of the episodes that it played.
    assert len(first["routing"] + second["routing"]) == len(episodes) and all(first["routing"] + second["routing"])
