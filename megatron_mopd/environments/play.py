"""Several turns over any rollout engine: all unfinished episodes go on together, one batch of turns after another."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_mopd.config import DomainSpec
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.protocol import Environment, EnvironmentFailure, Observation, Turn
from megatron_mopd.environments.transcript import Transcript
from megatron_mopd.rollout.engine import RolloutEngine, Sampling
from megatron_mopd.types import Episode, Prompt, Rollout

FindEnvironment = Callable[[EnvironmentSpec], Environment]
Anywhere = Callable[[bool], bool]
"""Whether something is so on any rank: `World.any`."""


@dataclass(slots=True)
class _Game:
    """One episode under way. Changed by one thread at a time."""

    place: int
    """Index of its prompt times samples, plus its sample: where its rollout is returned."""
    identity: str
    """Of this one attempt: a step that is repeated after a resume, or another run, begins another episode."""
    spec: EnvironmentSpec
    environment: Environment
    transcript: Transcript
    episode: Episode
    reward: float = 0.0
    over: bool = False

    def end(self, how: str, *, failed: bool = False) -> None:
        self.over = True
        self.episode = replace(self.episode, ended=how, failed=failed)


def play(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    domains: Mapping[str, DomainSpec],
    find: FindEnvironment,
    anywhere: Anywhere,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
) -> list[Rollout]:
    """As `RolloutEngine.generate`; prompts of a domain with an environment become episodes of several turns.

    What is sampled in turn t of an episode depends on (seed, prompt.id, sample, t) and on what stands before it, not on
    the number of ranks. A failure of an environment ends its episode and is recorded in `Rollout.episode`.

    Collective: engines may be, so that every rank asks its own for as many batches as the others, for empty ones where
    it has nothing to ask.
    """
    games = _new_games(prompts, domains, find, samples)
    if not (any(domain.environment for domain in domains.values()) and anywhere(bool(games))):
        return engine.generate(prompts, samples=samples, sampling=sampling, seed=seed)
    workers = max((game.spec.workers for game in games), default=1)
    with ThreadPoolExecutor(workers, thread_name_prefix="environment") as pool:
        list(pool.map(lambda game: _reset(game, seed), games))
        rollouts = _first_turns(engine, prompts, games, anywhere, samples=samples, sampling=sampling, seed=seed)
        while True:
            list(pool.map(_step, [game for game in games if not game.over]))
            waiting = [game for game in games if not game.over]
            if not anywhere(bool(waiting)):
                break
            _next_turns(engine, waiting, sampling, seed)
    rollouts.update({game.place: _finish(game) for game in games})
    return [rollouts[place] for place in range(len(prompts) * samples)]


def _new_games(
    prompts: Sequence[Prompt], domains: Mapping[str, DomainSpec], find: FindEnvironment, samples: int
) -> list[_Game]:
    games = []
    for index, prompt in enumerate(prompts):
        spec = domains[prompt.domain].environment
        if spec is None:
            continue
        environment = find(spec)
        for sample in range(samples):
            identity, start = f"{prompt.id}#{sample}-{secrets.token_hex(8)}", Transcript.begin(prompt, sample)
            games.append(_Game(index * samples + sample, identity, spec, environment, start, Episode(turns=0)))
    return games


def _first_turns(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    games: Sequence[_Game],
    anywhere: Anywhere,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
) -> dict[int, Rollout]:
    """Let all prompts be answered in one batch; returns the rollouts of those without an environment, by place.

    Only prompts to which an environment has said something first go by themselves: their samples share them no more.
    """
    by_place = {game.place: game for game in games}
    alone = {
        game.place // samples
        for game in games
        if len(game.transcript.token_ids) > len(game.transcript.prompt.token_ids)
    }
    shared = [index for index in range(len(prompts)) if index not in alone]
    answers = engine.generate([prompts[i] for i in shared], samples=samples, sampling=sampling, seed=seed)
    plain = {}
    for number, answer in enumerate(answers):
        place = shared[number // samples] * samples + number % samples
        if place in by_place:
            by_place[place].transcript = by_place[place].transcript.with_turn(answer)
        else:
            plain[place] = answer
    if anywhere(bool(alone)):
        _next_turns(engine, [game for game in games if game.place // samples in alone], sampling, seed)
    return plain


def _next_turns(engine: RolloutEngine, games: Sequence[_Game], sampling: Sampling, seed: int) -> None:
    """One turn of each, in one batch."""
    questions = []
    for game in games:
        transcript = game.transcript
        identity = f"{transcript.prompt.id}#{transcript.sample}@{len(transcript.turns)}"
        questions.append(transcript.question(identity))
    answers = engine.generate(questions, samples=1, sampling=sampling, seed=seed)
    for game, answer in zip(games, answers, strict=True):
        game.transcript = game.transcript.with_turn(answer)


def _reset(game: _Game, seed: int) -> None:
    """Begin; where the environment fails, the student still gives its one answer, for a rollout is never empty."""
    prompt, sample = game.transcript.prompt, game.transcript.sample
    observation = _ask(game, lambda seconds: game.environment.reset(game.identity, prompt, sample, seed, seconds))
    if observation is None:
        return
    if len(observation.token_ids) >= game.transcript.room:
        game.environment.close(game.identity)
        return game.end("room")
    game.transcript = game.transcript.with_observation(observation.token_ids)


def _step(game: _Game) -> None:
    """Show the environment the last turn, and take in what it says. A turn that was cut off is not shown."""
    transcript, last = game.transcript, game.transcript.turns[-1]
    if last.finish_reason == "length":
        game.environment.close(game.identity)
        return game.end("room")
    if game.episode.seconds >= game.spec.episode_seconds:  # used up before the first turn
        game.environment.close(game.identity)
        return game.end("time")
    number, before = len(transcript.turns) - 1, int(last.loss_mask.argmax())
    turn = Turn(token_ids=last.token_ids[before:], number=number, room=transcript.room)
    observation = _ask(game, lambda seconds: game.environment.step(game.identity, turn, seconds))
    if observation is None:
        return
    if observation.reward is not None:
        game.reward = observation.reward
    if observation.done:
        return game.end("answered")
    limit = _limit_met(game, len(observation.token_ids))
    if limit is not None:
        game.environment.close(game.identity)
        return game.end(limit)
    game.transcript = transcript.with_observation(observation.token_ids)


def _limit_met(game: _Game, tokens: int) -> str | None:
    if len(game.transcript.turns) >= game.spec.max_turns:
        return "turns"
    if game.episode.seconds >= game.spec.episode_seconds:
        return "time"
    return "room" if game.transcript.room - tokens < 1 else None


def _ask(game: _Game, question: Callable[[float], Observation]) -> Observation | None:
    """The environment's answer within the limits; None, and the end of the episode, where it fails."""
    episode, started = game.episode, time.monotonic()
    seconds = min(game.spec.turn_seconds, game.spec.episode_seconds - episode.seconds)
    try:
        observation = question(seconds)
    except EnvironmentFailure as failure:
        if failure.reason != "unreachable":
            game.environment.close(game.identity)
        game.episode = replace(episode, seconds=episode.seconds + time.monotonic() - started)
        game.end(failure.reason, failed=True)
        return None
    game.episode = replace(
        episode,
        calls=episode.calls + observation.calls,
        calls_failed=episode.calls_failed + observation.calls_failed,
        seconds=episode.seconds + time.monotonic() - started,
    )
    return observation


def _finish(game: _Game) -> Rollout:
    transcript = game.transcript
    reason = "length" if game.episode.ended == "room" else transcript.turns[-1].finish_reason
    return transcript.finish(replace(game.episode, turns=len(transcript.turns)), reason, game.reward)
