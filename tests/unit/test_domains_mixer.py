"""Shares, resume, held-out prompts, wrong answers and limits of the mixer, in numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_mopd.config import (
    BenchmarkSpec,
    DomainSpec,
    EvalSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    RunConfig,
    SourceSpec,
)
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError

TINY = Path(__file__).parents[2] / "configs/tiny/model"
SUM = SourceSpec(reasoning_gym="chain_sum", params={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2})
SPELL = SourceSpec(reasoning_gym="spell_backward", params={"min_word_len": 3, "max_word_len": 6})
GCD = SourceSpec(reasoning_gym="gcd", params={"min_numbers": 2, "max_numbers": 2, "max_value": 99})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def run_config(
    domains: dict[str, DomainSpec], seed: int = 0, stage: Literal["sft", "rl"] = "sft", **evaluation: Any
) -> RunConfig:
    config = RunConfig(
        run_dir="unused",
        stage="sft",
        steps=1,
        prompts_per_step=1,
        model=ModelSpec(hf_config=str(TINY)),
        domains=domains,
        optim=OptimSpec(lr=1e-3),
        objective=ObjectiveSpec(kind="cross_entropy"),
        seed=seed,
        evaluation=EvalSpec(**evaluation),
    )
    if stage == "rl":
        rollout = dataclasses.replace(config.rollout, samples_per_prompt=2)
        config = dataclasses.replace(config, stage="rl", rollout=rollout, objective=ObjectiveSpec(kind="grpo"))
    return config


def three(**changes: Any) -> dict[str, DomainSpec]:
    return {
        "math": DomainSpec(source=SUM, weight=0.35, **changes),
        "text": DomainSpec(source=SPELL, weight=0.35, **changes),
        "gcd": DomainSpec(source=GCD, weight=0.30, **changes),
    }


def jsonl(path: Path, prompts: list[str], answer: str = "a") -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt in prompts))
    return path


def lines(path: Path, held_out: Path | None = None, **changes: Any) -> dict[str, DomainSpec]:
    source = SourceSpec(jsonl=str(path), held_out=str(held_out) if held_out else None)
    return {"lines": DomainSpec(source=source, verifier="exact", **changes)}


def facts(prompts: Sequence[Prompt]) -> list[tuple[Any, ...]]:
    return [(p.id, p.domain, p.token_ids.tolist(), p.answer, p.max_response_tokens, dict(p.record)) for p in prompts]


def texts(tokenizer: Tokenizer, prompts: Iterable[Prompt]) -> set[str]:
    return {tokenizer.decode(prompt.token_ids) for prompt in prompts}


def sha(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def shares(prompts: list[Prompt]) -> dict[str, int]:
    return dict(Counter(prompt.domain for prompt in prompts))


def test_shares_are_exact_and_interleaved(tokenizer: Tokenizer) -> None:
    prompts = DomainMixer(run_config(three()), tokenizer).draw(20)
    assert shares(prompts) == {"math": 7, "text": 7, "gcd": 6}
    order = [prompt.domain for prompt in prompts]
    assert all(len(set(order[i : i + 4])) == 3 for i in range(17)), order
    assert [prompt.id for prompt in prompts if prompt.domain == "math"][:3] == ["math/0", "math/1", "math/2"]


def test_shares_converge_for_any_size_of_draw(tokenizer: Tokenizer) -> None:
    mixer = DomainMixer(run_config(three()), tokenizer)
    drawn = Counter[str]()
    for step in range(1, 61):
        drawn.update(shares(mixer.draw(7)))
        assert all(abs(drawn[d] - 7 * step * s) < 1 for d, s in (("math", 0.35), ("text", 0.35), ("gcd", 0.3)))
    assert drawn == {"math": 147, "text": 147, "gcd": 126}
    assert {domain: count["drawn"] for domain, count in mixer.counts().items()} == drawn


def test_draws_do_not_depend_on_how_they_are_cut(tokenizer: Tokenizer) -> None:
    cut, whole = DomainMixer(run_config(three()), tokenizer), DomainMixer(run_config(three()), tokenizer)
    pieces = [prompt for size in (1, 5, 0, 13, 21) for prompt in cut.draw(size)]
    assert facts(pieces) == facts(whole.draw(40))


def test_a_cascade_draws_one_domain_after_another_and_resumes_within_it(tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(run_config(three()), domain_schedule="sequential", steps=10)
    mixer, mixed = DomainMixer(config, tokenizer), DomainMixer(run_config(three()), tokenizer)
    steps = [mixer.draw(4, step) for step in range(5)]
    state = json.loads(json.dumps(mixer.state_dict()))
    steps += [mixer.draw(4, step) for step in range(5, 10)]
    # Shares 0.35, 0.35, 0.30 of ten steps: to 3.5, 7.0 and 10, of which the first rounds to 4.
    assert [shares(prompts) for prompts in steps] == [{"math": 4}] * 4 + [{"text": 4}] * 3 + [{"gcd": 4}] * 3
    # The prompts are those that a mixed run sees: only their order differs.
    alike = [prompt for prompt in mixed.draw(60) if prompt.domain == "text"][:12]
    assert facts([prompt for prompts in steps[4:7] for prompt in prompts]) == facts(alike)
    resumed = DomainMixer(config, tokenizer)
    resumed.load_state_dict(state)
    assert [facts(resumed.draw(4, step)) for step in range(5, 10)] == [facts(prompts) for prompts in steps[5:]]


def test_a_resumed_mixer_goes_on_as_if_uninterrupted(tokenizer: Tokenizer) -> None:
    config = run_config(three(wrong_answers=0.5), prompts=50)
    whole = DomainMixer(config, tokenizer)
    expected = [*whole.draw(33), *whole.draw(33)]
    first = DomainMixer(config, tokenizer)
    start = first.draw(33)
    state = json.loads(json.dumps(first.state_dict()))
    second = DomainMixer(config, tokenizer)
    second.load_state_dict(state)
    assert facts([*start, *second.draw(33)]) == facts(expected)
    assert second.counts() == whole.counts()
    assert second.state_dict() == whole.state_dict()


def test_state_of_other_domains_is_refused(tokenizer: Tokenizer) -> None:
    state = DomainMixer(run_config(three()), tokenizer).state_dict()
    mixer = DomainMixer(run_config({"math": DomainSpec(source=SUM)}), tokenizer)
    with pytest.raises(ConfigError, match="domains: the checkpoint has gcd, math, text, the configuration math;"):
        mixer.load_state_dict(state)


def test_seeds_give_other_prompts_but_the_same_held_out_ones(tokenizer: Tokenizer) -> None:
    zero, one = (DomainMixer(run_config(three(), seed=seed), tokenizer) for seed in (0, 1))
    other = DomainMixer(run_config(three()), tokenizer)
    assert facts(zero.draw(20)) == facts(other.draw(20))
    assert facts(zero.draw(20)) != facts(one.draw(20))
    assert facts(zero.held_out("math")) == facts(one.held_out("math"))
    changed = dataclasses.replace(run_config(three()), evaluation=EvalSpec(seed=5))
    assert facts(DomainMixer(changed, tokenizer).held_out("math")) != facts(zero.held_out("math"))


def test_held_out_prompts_are_distinct_and_never_trained_on(tokenizer: Tokenizer) -> None:
    small = SourceSpec(reasoning_gym="chain_sum", params={"min_terms": 2, "max_terms": 2, "max_digits": 1})
    mixer = DomainMixer(run_config({"math": DomainSpec(source=small)}, prompts=100), tokenizer)
    held_out = {tuple(prompt.token_ids) for prompt in mixer.held_out("math")}
    trained = [tuple(prompt.token_ids) for prompt in mixer.draw(1000)]
    assert len(mixer.held_out("math")) == len(held_out) == 100
    assert not held_out & set(trained)
    assert len(set(trained)) == 100  # the other half of the 10 x 10 x 2 sums
    counts = mixer.counts()["math"]
    assert counts["drawn"] == 1000
    assert 850 < counts["held_out_skipped"] < 1150
    assert mixer.held_out("math")[0].id.startswith("math/held_out/")


def test_a_source_that_is_all_held_out_is_an_error(tokenizer: Tokenizer) -> None:
    tiny = SourceSpec(reasoning_gym="count_bits", params={"min_n": 1, "max_n": 9})
    mixer = DomainMixer(run_config({"bits": DomainSpec(source=tiny)}), tokenizer)
    assert len(mixer.held_out("bits")) == 9
    with pytest.raises(ConfigError, match=r"domains\.bits: 1000 prompts in a row cannot be used .* 1000 held out"):
        mixer.draw(1)


def test_too_long_prompts_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", ["x" * length for length in range(1, 41)])
    mixer = DomainMixer(run_config(lines(path, max_prompt_tokens=22)), tokenizer)
    usable = len({tuple(prompt.token_ids) for prompt in mixer.draw(200)})
    assert max(len(prompt.token_ids) for prompt in mixer.draw(200)) == 22  # 20 letters, user, assistant
    held_out = {len(prompt.token_ids) - 2 for prompt in mixer.held_out("lines")}
    assert usable == 20 - len(held_out)
    counts = mixer.counts()["lines"]
    assert counts["drawn"] == 400
    assert counts["too_long"] > 300
    short = DomainMixer(run_config(lines(path, max_prompt_tokens=2)), tokenizer)
    with pytest.raises(ConfigError, match=r"domains\.lines: 1000 prompts in a row .*1000 longer than max_prompt_tok"):
        short.draw(1)
    with pytest.raises(ConfigError, match=r"domains\.lines\.source: no held-out prompt within max_prompt_tokens"):
        short.held_out("lines")


def test_a_held_out_file_is_all_kept_out_of_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [f"q{i}" for i in range(20)])
    other = jsonl(tmp_path / "y.jsonl", [f"q{i}" for i in range(20, 40)] * 2)
    more = jsonl(tmp_path / "z.jsonl", [f"q{i}" for i in range(30, 60)])
    domains = lines(path, other) | {"more": lines(more)["lines"]}
    mixer = DomainMixer(run_config(domains, prompts=5), tokenizer)
    drawn = mixer.draw(240)
    assert texts(tokenizer, [p for p in drawn if p.domain == "lines"]) == {f"q{i}" for i in range(20)}
    assert len({p.id for p in drawn}) == 240  # the index goes on over the epochs
    assert len(texts(tokenizer, mixer.held_out("lines"))) == 5
    # The other domain's file has ten of the twenty, used or not, and its own tenth to hold out.
    own = {f"q{i}" for i in range(30, 60) if sha(f"q{i}") % 10 == 0}
    assert texts(tokenizer, [p for p in drawn if p.domain == "more"]) == {f"q{i}" for i in range(40, 60)} - own
    assert mixer.counts()["lines"]["held_out_skipped"] == 0
    assert mixer.counts()["more"]["held_out_skipped"] > 30


def test_a_held_out_file_is_read_to_its_end_however_often_it_repeats_itself(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "x.jsonl", ["a", "b"])
    other = jsonl(tmp_path / "y.jsonl", [*["q"] * 6000, "rare"])
    more = jsonl(tmp_path / "z.jsonl", [f"q{i}" for i in range(30)] + ["rare"])
    mixer = DomainMixer(run_config(lines(path, other) | {"more": lines(more)["lines"]}, prompts=5), tokenizer)
    assert texts(tokenizer, mixer.held_out("lines")) == {"q", "rare"}
    assert "rare" not in texts(tokenizer, mixer.draw(100))


def test_files_that_share_questions_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [f"q{i}" for i in range(30)])
    other = jsonl(tmp_path / "y.jsonl", [f"q{i}" for i in range(28, 40)] * 2)
    with pytest.raises(ConfigError, match=r"domains\.lines\.source: 2 questions of \S+y\.jsonl are also in \S+x\.j"):
        DomainMixer(run_config(lines(path, other)), tokenizer)
    held_out = jsonl(tmp_path / "h.jsonl", ["q40", "q41"])
    source = SourceSpec(jsonl=str(path), held_out=str(held_out), validation=str(jsonl(tmp_path / "v.jsonl", ["q41"])))
    domains = {"lines": DomainSpec(source=source, verifier="exact")}
    with pytest.raises(ConfigError, match=r"1 questions of \S+v\.jsonl are also in \S+h\.jsonl, one is 'q41'"):
        DomainMixer(run_config(domains, validation_prompts=1), tokenizer)
    with pytest.raises(ConfigError, match=r"domains\.lines\.source\.validation: evaluation\.validation_prompts is 0"):
        run_config(domains)


def test_validation_prompts_are_apart_from_training_and_held_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = SourceSpec(reasoning_gym="chain_sum", params={"min_terms": 2, "max_terms": 2, "max_digits": 1})
    path = jsonl(tmp_path / "x.jsonl", [f"q{i}" for i in range(100)])
    domains = {"math": DomainSpec(source=small), "lines": lines(path)["lines"]}
    without = DomainMixer(run_config(domains, prompts=60), tokenizer)
    mixer = DomainMixer(run_config(domains, prompts=60, validation_prompts=40), tokenizer)
    tenths = [sum(sha(f"q{i}") % 10 == place for i in range(100)) for place in (0, 1)]
    drawn = mixer.draw(2400)
    for domain, sizes in {"math": [60, 40, 100], "lines": [*tenths, 100 - sum(tenths)]}.items():
        held_out, validation = mixer.held_out(domain), mixer.split(domain, "validation").prompts
        assert facts(held_out) == facts(without.held_out(domain))
        assert validation[0].id.startswith(f"{domain}/validation/")
        parts = [texts(tokenizer, part) for part in (held_out, validation, [p for p in drawn if p.domain == domain])]
        assert [len(part) for part in parts] == sizes
        assert len(set().union(*parts)) == sum(sizes)
    with pytest.raises(ConfigError, match=r"evaluation\.validation_prompts: is 0"):
        without.split("math", "validation")


def test_the_prompts_of_a_run_without_validation_are_those_of_earlier_versions(tokenizer: Tokenizer) -> None:
    mixer = DomainMixer(run_config(three(), seed=1), tokenizer)
    ids = json.dumps([p.token_ids.tolist() for p in [*mixer.draw(50), *mixer.held_out("gcd")]])
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "dd5647f2d8d4039f"  # of the commit 1bd3cc5


def test_benchmarks_are_kept_out_of_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [f"q{i}" for i in range(50)])
    bench = jsonl(tmp_path / "b.jsonl", ["q3", "q4", "far too long for the limit", "new", "new"])
    task = BenchmarkSpec(source=SourceSpec(jsonl=str(bench)), verifier="exact", max_prompt_tokens=7, system_prompt="s")
    other = BenchmarkSpec(source=SPELL, prompts=7)
    mixer = DomainMixer(run_config(lines(path), benchmarks={"b": task}, out_of_domain={"spell": other}), tokenizer)
    found = mixer.benchmark("benchmarks", "b")
    assert found.too_long == 1
    assert sorted(tokenizer.decode(p.token_ids) for p in found.prompts) == ["snew", "sq3", "sq4"]
    assert {p.domain for p in found.prompts} == {"b"}
    assert all(p.id.startswith("benchmarks.b/") for p in found.prompts)
    assert len(mixer.benchmark("out_of_domain", "spell").prompts) == 7
    assert not texts(tokenizer, mixer.draw(200)) & {"q3", "q4"}


def test_a_benchmark_that_cannot_be_used_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bench = jsonl(tmp_path / "b.jsonl", ["q3"])
    domains = {"math": DomainSpec(source=SUM)}
    task = BenchmarkSpec(source=SourceSpec(jsonl=str(bench)), verifier="exact", max_prompt_tokens=2)
    with pytest.raises(ConfigError, match=r"evaluation\.benchmarks\.b: no prompt within max_prompt_tokens"):
        DomainMixer(run_config(domains, benchmarks={"b": task}), tokenizer).check()
    gone = dataclasses.replace(task, source=SourceSpec(jsonl=str(tmp_path / "gone.jsonl")))
    with pytest.raises(ConfigError, match=r"evaluation\.benchmarks\.b\.source: \S+gone\.jsonl: No such file"):
        DomainMixer(run_config(domains, benchmarks={"b": gone}), tokenizer).check()
    unknown = BenchmarkSpec(source=SourceSpec(reasoning_gym="chain_sums"))
    with pytest.raises(ConfigError, match=r"evaluation\.out_of_domain\.o\.source\.reasoning_gym: no task 'chain_sums'"):
        DomainMixer(run_config(domains, out_of_domain={"o": unknown}), tokenizer).check()


def test_one_line_that_is_held_out_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = next(f"q{i}" for i in range(99) if sha(f"q{i}") % 10 == 0)
    path = jsonl(tmp_path / "x.jsonl", [name])
    with pytest.raises(ConfigError, match=r"domains\.lines\.source: all 1 prompts of .* fall into the held-out tenth"):
        DomainMixer(run_config(lines(path)), tokenizer)


def test_wrong_answers_come_at_their_rate_and_keep_the_record(tokenizer: Tokenizer) -> None:
    mixer = DomainMixer(run_config(three(wrong_answers=0.3)), tokenizer)
    prompts = mixer.draw(3000)
    for domain in ("math", "text", "gcd"):
        mine = [prompt for prompt in prompts if prompt.domain == domain]
        wrong = [prompt.answer != prompt.record["answer"] for prompt in mine]
        assert 0.26 < sum(wrong) / len(mine) < 0.34
    assert facts(DomainMixer(run_config(three(wrong_answers=0.3)), tokenizer).draw(3000)) == facts(prompts)
    assert all(prompt.answer == prompt.record["answer"] for prompt in mixer.held_out("math"))


def test_wrong_answers_are_for_sft_only() -> None:
    with pytest.raises(ConfigError, match=r"domains\.math\.wrong_answers: only in stage 'sft', not 'rl'"):
        run_config(three(wrong_answers=0.9), stage="rl")


def test_wrong_answers_need_two_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [f"q{i}" for i in range(9)])
    mixer = DomainMixer(run_config(lines(path, wrong_answers=0.9)), tokenizer)
    with pytest.raises(ConfigError, match=r"domains\.lines\.wrong_answers: all answers are 'a', none is wrong"):
        mixer.draw(20)


def test_sft_needs_reference_answers(tokenizer: Tokenizer) -> None:
    domain = {"logic": DomainSpec(source=SourceSpec(reasoning_gym="propositional_logic"))}
    with pytest.raises(ConfigError, match=r"stage 'sft' needs reference answers and item 0 has none"):
        DomainMixer(run_config(domain), tokenizer).draw(1)
    assert DomainMixer(run_config(domain, stage="rl", prompts=5), tokenizer).draw(1)[0].answer == ""


def test_a_system_prompt_goes_before_the_question(tokenizer: Tokenizer) -> None:
    domain = {"math": DomainSpec(source=SUM, system_prompt="Be brief.")}
    prompt = DomainMixer(run_config(domain), tokenizer).draw(1)[0]
    text = tokenizer.decode(prompt.token_ids, keep_special=True)
    assert text.startswith("<|system|>Be brief.<|user|>State the final answer")
