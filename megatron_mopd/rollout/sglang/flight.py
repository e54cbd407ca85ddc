"""Rollouts under way while the trainer does something else: begun, waited for, stopped on their way, gone on with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from megatron_mopd.rollout.engine import RolloutFailure
from megatron_mopd.rollout.sglang.client import Answer, Dispatcher, Request
from megatron_mopd.rollout.sglang.protocol import Part
from megatron_mopd.types import Prompt, Rollout

Choose = Callable[[Sequence[str]], Sequence[str] | None]
"""Ids of the prompts that are answered, the first answered first -> ids of those to take; None: wait for more."""
MakeRequest = Callable[[Prompt, int, int, Part | None], Request]
"""(prompt, sample, seed, what there is of it) -> the request for the rest."""


@dataclass(slots=True)
class _Question:
    """One prompt and its samples."""

    prompt: Prompt
    seed: int
    answers: dict[int, Rollout] = field(default_factory=dict)
    """By sample."""
    kept: dict[int, Part | None] = field(default_factory=dict)
    """Samples that are stopped, and what there is of them."""


class Flight:
    """On rank 0. A prompt is answered when all of its samples are; it stays here until it is taken."""

    def __init__(self, dispatcher: Dispatcher, make_request: MakeRequest, samples: int) -> None:
        self._dispatcher, self._make_request, self._samples = dispatcher, make_request, samples
        self._questions: dict[str, _Question] = {}
        self._answered: list[str] = []
        self._running = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        """Guards all of the above: answers come in the dispatcher's thread."""

    def begin(self, prompt: Prompt, seed: int) -> None:
        with self._changed:
            self._questions[prompt.id] = _Question(prompt, seed)
        for sample in range(self._samples):
            self._ask(prompt.id, sample, None)

    def wait(self, choose: Choose) -> list[Rollout]:
        """The rollouts of the prompts that `choose` takes, in its order; it is asked again whenever one is answered.

        Raises what the first rollout that failed has failed with.
        """
        with self._changed:
            while True:
                self._raise_failure()
                chosen = choose(tuple(self._answered))
                if chosen is not None:
                    return [rollout for identity in chosen for rollout in self._take(identity)]
                self._changed.wait()

    def stop(self) -> None:
        """Nothing is under way after it; `resume` goes on from what there is."""
        self._stopping = True
        self._dispatcher.stop()
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
            self._stopping = False
            self._raise_failure()

    def resume(self) -> None:
        """Go on with all that is stopped."""
        with self._changed:
            stopped = [(name, *item) for name, question in self._questions.items() for item in question.kept.items()]
        for identity, sample, kept in stopped:
            del self._questions[identity].kept[sample]
            self._ask(identity, sample, kept)

    @property
    def kept_tokens(self) -> int:
        """Of the answers that are stopped on their way."""
        with self._changed:
            return sum(
                len(part.token_ids) - len(question.prompt.token_ids)
                for question in self._questions.values()
                for part in question.kept.values()
                if part is not None
            )

    def _ask(self, identity: str, sample: int, kept: Part | None) -> None:
        question = self._questions[identity]
        request = self._make_request(question.prompt, sample, question.seed, kept)
        with self._changed:
            self._running += 1
        self._dispatcher.submit(request).add_done_callback(partial(self._land, identity, sample, kept))

    def _land(self, identity: str, sample: int, kept: Part | None, future: Future[Answer]) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()
            if future.cancelled():
                return
            if (error := future.exception()) is not None:
                self._failure = self._failure or error
                return
            answer, question = future.result(), self._questions[identity]
            if isinstance(answer, Rollout):
                question.answers[sample] = answer
                if len(question.answers) == self._samples:
                    self._answered.append(identity)
            elif self._stopping:
                question.kept[sample] = answer or kept
            else:
                self._failure = RolloutFailure(
                    f"rollout.sglang: prompt {identity}: its answer was ended early by somebody else; this run's "
                    "servers are nobody else's"
                )

    def _take(self, identity: str) -> list[Rollout]:
        self._answered.remove(identity)
        answers = self._questions.pop(identity).answers
        return [answers[sample] for sample in range(self._samples)]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
