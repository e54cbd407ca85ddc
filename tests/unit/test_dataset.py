"""The file of stored answers: round trip, broken files, and the order in which they are learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mopd.compute import Compute, read_compute
from megatron_mopd.config import DomainSpec, ModelSpec, ObjectiveSpec, OptimSpec, RolloutSpec, RunConfig, SourceSpec
from megatron_mopd.domains.dataset import Cost, Dataset, StoredAnswer, origin_of
from megatron_mopd.domains.dataset_writer import DatasetWriter, SoFar
from megatron_mopd.domains.mixer import DomainMixer, DomainState
from megatron_mopd.domains.stored_feed import StoredFeed
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.stored_answers import StoredAnswers
from megatron_mopd.run_identity import check_same_run, run_identity
from megatron_mopd.sample import write_answers
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError

MODEL = Path(__file__).parents[2] / "configs" / "tiny" / "model"
VOCABULARY = 114
NOTHING = frozenset[str]()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


def stored(domain: str, index: int) -> StoredAnswer:
    return StoredAnswer(
        domain=domain,
        id=f"{domain}/{index}",
        question=f"q{index}",
        sample=0,
        prompt=[5, 6, 7 + index],
        response=[20 + index, 1],
        finish_reason="stop",
        reward=index % 2,
    )


def write(path: Path, tokenizer: Tokenizer, sizes: dict[str, int]) -> Path:
    with DatasetWriter(path, origin_of(tokenizer, {"a": "1" * 64}, "all"), {}) as writer:
        for domain, size in sizes.items():
            for index in range(size):
                writer.write(stored(domain, index))
        writer.finish(
            Cost(answers=sum(sizes.values()), sampled=sizes, left_out={"a": 3}, generated_tokens=44, seconds=1.5)
        )
    return path


def config(path: Path, **domain: int) -> RunConfig:
    source = SourceSpec(reasoning_gym="spell_backward", params={"min_word_len": 3, "max_word_len": 6})
    return RunConfig(
        run_dir="unused",
        stage="sft",
        steps=10,
        prompts_per_step=4,
        model=ModelSpec(hf_config=str(MODEL)),
        domains={name: DomainSpec(source=source, max_response_tokens=8, **domain) for name in "ab"},  # type: ignore[arg-type]
        objective=ObjectiveSpec(kind="cross_entropy"),
        optim=OptimSpec(lr=1e-3),
        rollout=RolloutSpec(engine="dataset", dataset=str(path)),
    )


def test_only_correct_answers_are_kept_and_all_are_paid_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = [
        Prompt(id=f"{domain}/{index}", domain=domain, token_ids=np.array([5, 6]), answer="", max_response_tokens=8)
        for domain, index in (("a", 0), ("a", 1), ("b", 0))
    ]
    rewards = (1.0, 0.5, 1.0 - 1e-9)  # half a point is not correct; the last bits are rounding
    rollouts = [
        Rollout(
            prompt=prompt,
            sample=0,
            token_ids=np.array([5, 6, 20, *[21] * index, 1]),
            loss_mask=np.arange(4 + index) >= 2,
            rollout_logprobs=np.zeros(4 + index, np.float32),
            policy_version=0,
            finish_reason="stop",
            reward=reward,
        )
        for index, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True))
    ]
    for keep, ids in (("correct", ["a/0", "b/0"]), ("all", ["a/0", "a/1", "b/0"])):
        path = tmp_path / f"{keep}.jsonl"
        with DatasetWriter(path, origin_of(tokenizer, {}, keep), {}) as writer:
            cost = write_answers([rollouts[:2], [], rollouts[2:]], writer, keep)  # type: ignore[arg-type]
            writer.finish(cost)
        dataset = Dataset.load(path, VOCABULARY)
        assert [dataset.answer(name, index).id for name in "ab" for index in range(dataset.size(name))] == ids
        assert (cost.answers, cost.sampled, cost.generated_tokens) == (len(ids), {"a": 2, "b": 1}, 2 + 3 + 4)
        assert cost.left_out == {"a": 3 - len(ids), "b": 0}


def test_round_trip(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 7, "b": 4})
    dataset = Dataset.load(path, VOCABULARY)
    assert (dataset.size("a"), dataset.size("b"), dataset.size("c")) == (7, 4, 0)
    assert [dataset.answer("b", index) for index in (3, 0)] == [stored("b", 3), stored("b", 0)]
    assert dataset.origin == origin_of(tokenizer, {"a": "1" * 64}, "all")
    dataset.check({"a": None, "b": None}, tokenizer)
    assert read_compute(path) == Compute(generated_tokens=44, seconds=1.5)
    assert list(tmp_path.iterdir()) == [path]


def test_the_fingerprint_is_of_the_answers_and_not_of_the_time_it_took(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = write(tmp_path / "a.jsonl", tokenizer, {"a": 3})
    prints = [Dataset.load(first, VOCABULARY).fingerprint]
    for old, new in (('"seconds": 1.5', '"seconds": 9.5'), ('"reward":1', '"reward":0')):
        first.write_text(first.read_text().replace(old, new))
        prints.append(Dataset.load(first, VOCABULARY).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_an_interrupted_dataset_goes_on_after_its_last_whole_step(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, origin = tmp_path / "x.jsonl", origin_of(tokenizer, {}, "all")
    with pytest.raises(RuntimeError), DatasetWriter(path, origin, {"seed": 1}) as writer:
        writer.write(stored("a", 0))
        writer.end_step(sampled={"a": 1}, left_out={}, tokens=2, seconds=3.0)
        writer.write(stored("a", 1))  # of a step that was not finished
        raise RuntimeError
    assert not path.exists()
    with DatasetWriter(path, origin, {"seed": 2}) as other:  # of another run: nothing of it is taken
        assert other.so_far == SoFar()
    with DatasetWriter(path, origin, {"seed": 1}) as writer:
        assert writer.so_far.steps == 0  # the other one has begun anew
        writer.write(stored("a", 0))
        writer.end_step(sampled={"a": 1}, left_out={}, tokens=2, seconds=3.0)
        writer.write(stored("a", 1))
    with DatasetWriter(path, origin, {"seed": 1}) as writer:
        assert (writer.so_far.steps, writer.so_far.sampled, writer.so_far.seconds) == (1, {"a": 1}, 3.0)
        writer.write(stored("a", 2))
        writer.finish(Cost(answers=2, sampled={"a": 2}, left_out={"a": 0}, generated_tokens=4, seconds=5.0))
    dataset = Dataset.load(path, VOCABULARY)
    assert [dataset.answer("a", index) for index in range(dataset.size("a"))] == [stored("a", 0), stored("a", 2)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_dataset_that_cannot_be_written(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"/proc/x/a\.jsonl: cannot be written"):
        DatasetWriter(Path("/proc/x/a.jsonl"), origin_of(tokenizer, {}, ""), {})


def edit(number: int, **keys: object) -> Callable[[list[str]], list[str]]:
    """Change keys of one line; None removes the key."""

    def apply(lines: list[str]) -> list[str]:
        tree = {key: value for key, value in (json.loads(lines[number]) | keys).items() if value is not None}
        return [*lines[:number], json.dumps(tree), *lines[number + 1 :]]

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "is empty"),
        (lambda lines: lines[:-1], r"is incomplete \(no last line\); write it again with `mopd sample`"),
        (lambda lines: [lines[0], *lines[2:]], r"is incomplete \(2 answers, its last line says 3\)"),
        (lambda lines: lines[1:], "answers.jsonl:1: does not say where the answers are from"),
        (lambda lines: [lines[0], lines[1][:-9], *lines[2:]], "answers.jsonl:2: not a line of JSON"),
        (lambda lines: [lines[0], "[]", *lines[2:]], "answers.jsonl:2: expected a JSON object, got list"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 9'), *lines[1:]], ":1: format 9, this program"),
        (edit(1, response=None), "answers.jsonl:2: expected the keys domain, id, question, sample"),
        (edit(1, other=1), "answers.jsonl:2: expected the keys domain"),
        (edit(1, response=[]), 'answers.jsonl:2: "response" must be a list of token ids, not empty'),
        (edit(1, prompt="text"), 'answers.jsonl:2: "prompt" must be a list of token ids'),
        (edit(2, response=[1, VOCABULARY]), ':3: token 114 of "response" is outside the vocabulary of 114'),
        (edit(2, prompt=[-1]), ':3: token -1 of "prompt" is outside'),
        (edit(1, domain=3), ':2: "domain" must be a string, got 3'),
        (edit(1, finish_reason="eos"), ":2: \"finish_reason\" must be stop or length, got 'eos'"),
        (edit(1, reward=2), r':2: "reward" must be a number in \[0, 1\], got 2'),
    ],
)
def test_broken_files(
    change: Callable[[list[str]], list[str]], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 3})
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(ConfigError, match=message):
        Dataset.load(path, VOCABULARY)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.dataset: .*/x: No such file or directory; `mopd sample CONFIG"):
        Dataset.load(tmp_path / "x", VOCABULARY)


def test_answers_that_do_not_fit_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 3})
    dataset = Dataset.load(path, VOCABULARY)
    with pytest.raises(ConfigError, match=r"has no answer of domain 'b' \(it has a\); remove the domain, or write it"):
        dataset.check({"a": None, "b": None}, tokenizer)
    path.write_text(path.read_text().replace(tokenizer.fingerprint.vocab_hash, "0" * 64))
    with pytest.raises(ConfigError, match="another tokenizer than the student's: the vocabulary differs"):
        Dataset.load(path, VOCABULARY).check({"a": None}, tokenizer)
    dataset.check_teachers({"a": "1" * 64})
    with pytest.raises(ConfigError, match="domain 'a' was answered by weights 111111111111, its teacher has 2222"):
        dataset.check_teachers({"a": "2" * 64})


def test_a_file_that_changes_under_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 3})
    dataset = Dataset.load(path, VOCABULARY)
    path.write_text(path.read_text().replace('"reward":1', '"reward":0'))
    assert dataset.answer("a", 0) == stored("a", 0)
    with pytest.raises(ConfigError, match=r"answers.jsonl was changed while the run reads it; restore it and resume"):
        dataset.answer("a", 1)


def read(feed: StoredFeed, state: DomainState, count: int) -> list[int]:
    return [feed.next(state, NOTHING).record["response"][0] - 20 for _ in range(count)]


def test_an_epoch_has_every_answer_once_and_the_order_depends_on_the_seed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 9, "b": 9})
    dataset, run = Dataset.load(path, VOCABULARY), config(path)
    state = DomainState()
    order = read(StoredFeed("a", run, dataset), state, 18)
    assert sorted(order[:9]) == sorted(order[9:]) == list(range(9))
    assert order[:9] != order[9:]
    assert (state.cursor, state.drawn) == (18, 18)
    assert read(StoredFeed("a", run, dataset), DomainState(cursor=5), 13) == order[5:]  # a resume
    assert read(StoredFeed("a", replace(run, seed=1), dataset), DomainState(), 9) != order[:9]
    assert read(StoredFeed("b", run, dataset), DomainState(), 9) != order[:9]


def test_what_cannot_be_used_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 6, "b": 6})
    dataset = Dataset.load(path, VOCABULARY)
    state, feed = DomainState(), StoredFeed("a", config(path), dataset)
    found = [feed.next(state, frozenset({"q2", "q5"})).record["id"] for _ in range(8)]
    assert set(found) == {"a/0", "a/1", "a/3", "a/4"}
    # A part of the third epoch may have been skipped already or not: that depends on the order.
    assert state.drawn == 8 and state.too_long == 0 and 4 <= state.held_out_skipped <= 6
    assert state.cursor == state.drawn + state.held_out_skipped
    for limit in ({"max_response_tokens": 1}, {"max_prompt_tokens": 2}):
        domains = {"a": replace(config(path).domains["a"], **limit)}
        short = StoredFeed("a", replace(config(path), domains=domains), dataset)
        state = DomainState()
        with pytest.raises(ConfigError, match="none of the 6 answers of domain 'a' can be used"):
            short.next(state, NOTHING)
        assert state.too_long == 12
    one = frozenset({f"q{index}" for index in range(5)})  # wherever it lies in an epoch, it is found
    state = DomainState()
    assert {feed.next(state, one).record["id"] for _ in range(20)} == {"a/5"}


def test_the_mixer_draws_from_the_dataset_and_resumes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 5, "b": 5})
    run, dataset = config(path), Dataset.load(path, VOCABULARY)
    mixer = DomainMixer(run, tokenizer, dataset)
    mixer.check()
    first = [prompt.id for prompt in mixer.draw(7)]
    assert first == ["a/0", "b/0", "a/1", "b/1", "a/2", "b/2", "a/3"]
    state = json.loads(json.dumps(mixer.state_dict()))
    rest = [prompt.record for prompt in mixer.draw(9)]
    resumed = DomainMixer(run, tokenizer, dataset)
    resumed.load_state_dict(state)
    assert [prompt.record for prompt in resumed.draw(9)] == rest
    assert mixer.counts()["a"] == {"drawn": 8, "too_long": 0, "held_out_skipped": 0, "wrong_left_out": 3}
    assert len(mixer.held_out("a")) == 200  # of the source, as in any other run


def test_a_stored_prompt_is_answered_as_it_is_stored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 2, "b": 1})
    mixer = DomainMixer(config(path), tokenizer, Dataset.load(path, VOCABULARY))
    prompts = mixer.draw(4)
    engine, sampling = StoredAnswers(), Sampling(temperature=1.0)
    for prompt, rollout in zip(prompts, engine.generate(prompts, samples=1, sampling=sampling, seed=0), strict=True):
        answer = stored(prompt.domain, int(prompt.record["id"][2:]))
        assert rollout.token_ids.tolist() == [*answer.prompt, *answer.response]
        assert rollout.response_ids.tolist() == answer.response
        assert (rollout.reward, rollout.finish_reason) == (answer.reward, "stop")
        assert not rollout.rollout_logprobs.any()
    with pytest.raises(ValueError, match="a stored prompt has one answer, got 2"):
        engine.generate(prompts, samples=2, sampling=sampling, seed=0)
    foreign = Prompt(id="x", domain="a", token_ids=prompts[0].token_ids, answer="", max_response_tokens=8)
    with pytest.raises(ValueError, match="prompt x: has no stored answer"):
        engine.generate([foreign], samples=1, sampling=sampling, seed=0)


def test_a_run_is_of_its_dataset_wherever_that_lies(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "answers.jsonl", tokenizer, {"a": 2, "b": 2})
    before = run_identity(config(path), tokenizer, Dataset.load(path, VOCABULARY))
    moved = path.rename(tmp_path / "moved.jsonl")
    check_same_run(before, run_identity(config(moved), tokenizer, Dataset.load(moved, VOCABULARY)), tmp_path)
    moved.write_text(moved.read_text().replace('"reward":1', '"reward":0'))
    after = run_identity(config(moved), tokenizer, Dataset.load(moved, VOCABULARY))
    with pytest.raises(ConfigError, match=r"is of another run: rollout.dataset was '\w+', is '\w+'"):
        check_same_run(before, after, tmp_path)
