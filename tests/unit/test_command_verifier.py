"""`verifier: command` with real programs, good and bad, and what a preflight finds; SWE-bench's and IFBench's bridges.

Their harnesses need Docker and packages of their own: stand-ins that read and write the same files take their place.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_mopd import preflight
from megatron_mopd.config import (
    DomainSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    RolloutSpec,
    RunConfig,
    SourceSpec,
    load_config,
)
from megatron_mopd.domains.command import Question, by_sample, check_command, question_text, score_by_command
from megatron_mopd.domains.reasoning import after_reasoning
from megatron_mopd.domains.swe_bench import extract_patch
from megatron_mopd.domains.verifiers import verify
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/tiny/model"

SCORE_BY_LENGTH = """
    import json, sys
    for line in reversed(sys.stdin.readlines()):
        q = json.loads(line)
        assert set(q) == {"id", "prompt", "response", "answer", "record"}, q
        print(json.dumps({"id": q["id"], "score": len(q["response"]) / q["record"]["longest"]}))
"""


def program(folder: Path, text: str) -> tuple[str, ...]:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return (sys.executable, str(path))


def command_spec(command: tuple[str, ...], seconds: float = 60.0) -> DomainSpec:
    return DomainSpec(
        source=SourceSpec(jsonl="unused.jsonl"), verifier="command", command=command, command_seconds=seconds
    )


def question(number: int, response: str = "", **record: Any) -> Question:
    return Question(id=f"d/{number}#0", prompt="p", response=response, answer="", record=record)


def run_config(stage: Literal["rl", "sft"] = "rl", **domains: DomainSpec) -> RunConfig:
    return RunConfig(
        run_dir="unused",
        stage=stage,
        steps=1,
        prompts_per_step=1,
        model=ModelSpec(hf_config=str(TINY)),
        domains=domains,
        optim=OptimSpec(lr=1e-3),
        objective=ObjectiveSpec(kind="grpo"),
        rollout=RolloutSpec(samples_per_prompt=2),
    )


def test_scores_come_back_in_the_order_of_the_questions(tmp_path: Path) -> None:
    spec = command_spec(program(tmp_path, SCORE_BY_LENGTH))
    questions = [question(n, text, longest=8) for n, text in enumerate(["ab", "", "a\nb\u2028\ud800", "abcdefgh"])]
    assert score_by_command("domains.d", spec, questions) == [2 / 8, 0.0, 5 / 8, 1.0]
    assert score_by_command("domains.d", spec, []) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('loading')", "line 1 of its output is not JSON: 'loading'; print logs to standard error"),
        ("print('[1]')", 'line 1 of its output: expected {"id": text, "score": number}, got'),
        ("", "no score for id 'd/0#0' (1 of 1)"),
        ("""print('{"id": "x", "score": 1}\\n{"id": "d/0#0", "score": 1}')""", "a score for unknown id 'x' (1 of 1)"),
        ("""print('{"id": "d/0#0", "score": 1}\\n' * 2)""", "line 2 of its output: a second score for id 'd/0#0'"),
        ("""print('{"id": "d/0#0", "score": 1.5}')""", "must be a number from 0 to 1, got 1.5"),
        ("""print('{"id": "d/0#0", "score": NaN}')""", "must be a number from 0 to 1, got nan"),
        ("""print('{"id": "d/0#0", "score": "1"}')""", "must be a number from 0 to 1, got '1'"),
        ("import sys; sys.exit('no\\nDocker here')", "ended with code 1: Docker here"),
        ("import sys; sys.exit(7)", "ended with code 7: nothing on standard error"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with code -9"),
        ("import time; time.sleep(600)", "no end after 0.5 s for 1 responses; raise command_seconds"),
    ],
)
def test_bad_programs(tmp_path: Path, text: str, message: str) -> None:
    spec = command_spec(program(tmp_path, text), seconds=0.5 if "sleep" in text else 60.0)
    with pytest.raises(ConfigError) as error:
        score_by_command("domains.d", spec, [question(0)])
    assert str(error.value).startswith("domains.d.command: ")
    assert message in str(error.value)


def test_a_program_that_is_too_slow_ends_with_its_children(tmp_path: Path) -> None:
    text = f"""
        import fcntl, os, time
        lock = open({str(tmp_path / "lock")!r}, "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.fork()
        time.sleep(10**6)
    """
    with pytest.raises(ConfigError, match="no end after 3 s"):
        score_by_command("domains.d", command_spec(program(tmp_path, text), seconds=3.0), [question(0)])
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # returns when both are dead


def test_a_program_may_end_without_reading(tmp_path: Path) -> None:
    many = [question(n, "x" * 1000) for n in range(1000)]  # more than a pipe holds
    with pytest.raises(ConfigError, match=r"no score for id 'd/0#0' \(1000 of 1000\)"):
        score_by_command("domains.d", command_spec(program(tmp_path, "")), many)


def test_check_finds_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"domains.d.command: no program 'no-such-thing' here; install it"):
        check_command("domains.d", command_spec(("no-such-thing",)))
    with pytest.raises(ConfigError, match="No module named no_such_module"):
        check_command("domains.d", command_spec((sys.executable, "-m", "no_such_module")))
    script = tmp_path / "script"
    script.write_text("print()")
    script.chmod(0o755)  # without a #! line
    with pytest.raises(ConfigError, match="cannot start"):
        check_command("domains.d", command_spec((str(script),)))
    check_command("domains.d", command_spec(program(tmp_path, SCORE_BY_LENGTH)))
    check_command("domains.d", DomainSpec(source=SourceSpec(jsonl="x"), verifier="exact"))


def test_each_domain_is_scored_by_its_own_verifier(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(TINY)
    lines = SourceSpec(jsonl="unused.jsonl")
    config = run_config(
        first=command_spec(program(tmp_path, SCORE_BY_LENGTH)),
        follow=DomainSpec(source=lines, verifier="ifeval"),
        exact=DomainSpec(source=lines, verifier="exact"),
    )
    record = {
        "first": {"prompt": "?", "longest": 4},
        "follow": {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]},
        "exact": {},
    }
    texts = [("first", 0, "ab"), ("follow", 0, "<think>a, b</think> ab"), ("exact", 0, "ab"), ("first", 1, "abcd")]
    texts += [("follow", 1, '"ab"'), ("follow", 2, "<think>ab"), ("exact", 1, "b")]

    def answered(domain: str, sample: int, text: str) -> Rollout:
        ids = tokenizer.render([{"role": "user", "content": "?"}])
        prompt = Prompt(
            id=f"{domain}/0", domain=domain, token_ids=ids, answer="ab", max_response_tokens=9, record=record[domain]
        )
        tokens = np.concatenate([ids, np.array(tokenizer.encode(text), dtype=np.int64)])
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=tokens,
            loss_mask=np.arange(len(tokens)) >= len(ids),
            rollout_logprobs=np.zeros(len(tokens), dtype=np.float32),
            policy_version=0,
            finish_reason="stop",
        )

    rewards = [rollout.reward for rollout in verify([answered(*text) for text in texts], config.domains, tokenizer)]
    assert rewards == [0.5, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_preflight_stops_an_unknown_instruction_kind(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    good = {"prompt": "?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    bad = good | {"instruction_id_list": ["punctuation:no_dots"]}
    data.write_text("".join(json.dumps(good | {"prompt": f"question {n}"}) + "\n" for n in range(40)))
    spec = DomainSpec(
        source=SourceSpec(jsonl=str(data)), verifier="ifeval", max_prompt_tokens=64, max_response_tokens=8
    )
    preflight.check(run_config(follow=spec), 1)
    with data.open("a") as file:
        file.write(json.dumps(bad) + "\n")
    with pytest.raises(ConfigError, match=rf"{data}:41: unknown instruction kind 'punctuation:no_dots'.*known: key"):
        preflight.check(run_config(follow=spec), 1)


def test_preflight_stops_a_command_that_cannot_run(tmp_path: Path) -> None:
    spec = DomainSpec(
        source=SourceSpec(reasoning_gym="spell_backward"),
        verifier="command",
        command=program(tmp_path, "import no_such_module"),
        max_prompt_tokens=128,
        max_response_tokens=8,
    )
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        preflight.check(run_config(words=spec), 1)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("{source: {jsonl: x}, verifier: command}", "domains.a: command: missing; verifier 'command' needs a list"),
        ("{source: {jsonl: x}, verifier: command, command: ['']}", "domains.a: command: missing"),
        (
            "{source: {jsonl: x}, verifier: command, command: run me}",
            "a.command: expected a list, got 'run me'",
        ),
        (
            "{source: {jsonl: x}, verifier: exact, command: [a]}",
            "command: only used by verifier 'command'",
        ),
        ("{source: {jsonl: x}, verifier: command, command: [a], command_seconds: 0}", "command_seconds: must be > 0"),
        (
            "{source: {reasoning_gym: gcd}, verifier: ifeval}",
            "verifier: 'ifeval' needs a jsonl source; `mopd",
        ),
    ],
)
def test_configuration(tmp_path: Path, domain: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "{run_dir: r, stage: rl, steps: 1, prompts_per_step: 2, model: {hf_config: m}, optim: {lr: 1e-4},"
        f" objective: {{kind: grpo}}, rollout: {{samples_per_prompt: 2}}, domains: {{a: {domain}}}}}"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)


def test_question_text() -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    assert question_text({"messages": messages}) == "Be short.\nWhy?"
    assert question_text({"prompt": "Why?"}) == "Why?"
    assert question_text({"question": "Why?", "metadata": {}}) == "Why?"


def test_after_reasoning() -> None:
    assert after_reasoning(" plain ") == "plain"
    assert after_reasoning("<think>a</think>\n\nb </think> c\n") == "c"
    assert after_reasoning("a</think>b") == "b"
    assert after_reasoning("<think>a") == ""


def test_rounds_hold_each_key_once() -> None:
    questions = [Question(id=str(n), prompt=key, response="", answer="", record={}) for n, key in enumerate("abaacb")]
    rounds = by_sample(questions, lambda question: question.prompt)
    assert [[question.id for question in group] for group in rounds] == [["0", "1", "4"], ["2", "5"], ["3"]]


PATCH = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"


@pytest.mark.parametrize(
    ("response", "patch"),
    [
        (f"Here:\n```diff\n{PATCH}```\nDone.", PATCH),
        (f"```diff\nwrong\n```\nBetter:\n```patch\n{PATCH}```", PATCH),
        (f"<think>```diff\nwrong\n```</think>Here:\n{PATCH}", PATCH),
        (f"<think>{PATCH}", ""),
        ("```python\nprint()\n```", ""),
        ("--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+b", "--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+b\n"),
    ],
)
def test_patch_of_a_response(response: str, patch: str) -> None:
    assert extract_patch(response) == patch


def bridge(
    module: str, arguments: list[str], questions: list[Question], path: Path
) -> subprocess.CompletedProcess[str]:
    lines = "".join(
        json.dumps({"id": q.id, "prompt": q.prompt, "response": q.response, "answer": q.answer, "record": q.record})
        + "\n"
        for q in questions
    )
    return subprocess.run(
        [sys.executable, "-m", f"megatron_mopd.domains.{module}", *arguments],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])},
    )


def test_swe_bench(tmp_path: Path) -> None:
    """The stand-in resolves an instance when its patch says so, and writes no report for a patch that is broken."""
    harness = tmp_path / "swebench/harness"
    harness.mkdir(parents=True)
    (harness / "run_evaluation.py").write_text(
        textwrap.dedent("""
            import argparse, json, pathlib
            parser = argparse.ArgumentParser()
            for name in ("dataset_name", "predictions_path", "run_id", "max_workers"):
                parser.add_argument(f"--{name}", required=True)
            options = parser.parse_args()
            assert options.dataset_name == "princeton-nlp/SWE-bench_Verified" and options.max_workers == "3"
            predictions = [json.loads(line) for line in open(options.predictions_path)]
            ids = [p["instance_id"] for p in predictions]
            assert len(ids) == len(set(ids))
            print("progress that must not reach the scores")
            for p in predictions:
                if "+broken" not in p["model_patch"]:
                    model, instance = p["model_name_or_path"], p["instance_id"]
                    folder = pathlib.Path("logs/run_evaluation", options.run_id, model, instance)
                    folder.mkdir(parents=True)
                    resolved = "+right" in p["model_patch"]
                    (folder / "report.json").write_text(json.dumps({instance: {"resolved": resolved}}))
        """)
    )
    answers = ["right", "wrong", "right", "broken", None]
    instances = ["a__b-1", "a__b-1", "a__b-2", "a__b-1", "a__b-2"]
    questions = [
        Question(
            id=str(n),
            prompt="p",
            response=f"```diff\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+{answer}\n```" if answer else "I cannot.",
            answer="",
            record={"instance_id": instance},
        )
        for n, (answer, instance) in enumerate(zip(answers, instances, strict=True))
    ]
    done = bridge("swe_bench", ["--max_workers", "3"], questions, tmp_path)
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in done.stdout.splitlines()]
    assert {s["id"]: s["score"] for s in scores} == {"0": 1.0, "1": 0.0, "2": 1.0, "3": 0.0, "4": 0.0}
    failed = bridge("swe_bench", [], questions[:1], tmp_path)  # the stand-in wants --max_workers
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "run_evaluation ended with code 2; see its lines above" in failed.stderr.splitlines()[-1]
    absent = bridge("swe_bench", [], [], tmp_path / "nowhere")
    assert absent.returncode == 1
    assert "the package swebench is not installed" in absent.stderr


def test_ifbench(tmp_path: Path) -> None:
    """The stand-in calls an instruction followed when its name is in the response; loose ignores the case."""
    (tmp_path / "run_eval.py").write_text(
        textwrap.dedent("""
            import argparse, json, os
            parser = argparse.ArgumentParser()
            for name in ("input_data", "input_response_data", "output_dir"):
                parser.add_argument(f"--{name}", required=True)
            options = parser.parse_args()
            read = lambda path: [json.loads(line) for line in open(path)]
            responses = {line["prompt"]: line["response"] for line in read(options.input_response_data)}
            inputs = read(options.input_data)
            assert len(responses) == len(inputs) and all("key" in line for line in inputs)
            os.makedirs(options.output_dir)
            print("report that must not reach the scores")
            for mode, change in (("strict", str), ("loose", str.lower)):
                with open(f"{options.output_dir}/responses-eval_results_{mode}.jsonl", "w") as out:
                    for line in inputs:
                        text = change(responses[line["prompt"]])
                        flags = [kind in text for kind in line["instruction_id_list"]]
                        print(json.dumps({"prompt": line["prompt"], "follow_instruction_list": flags}), file=out)
        """)
    )
    record = {"instruction_id_list": ["count:a", "count:b"], "kwargs": [{}, {}]}
    texts = [("p", "count:a"), ("p", "<think>count:b</think>x"), ("q", "COUNT:A count:b"), ("p", "count:b count:a")]
    questions = [
        Question(id=str(n), prompt=prompt, response=text, answer="", record=record | {"prompt": prompt})
        for n, (prompt, text) in enumerate(texts)
    ]
    for arguments, expected in (([], [0.5, 0.0, 1.0, 1.0]), (["--strict"], [0.5, 0.0, 0.5, 1.0])):
        done = bridge("ifbench", ["--repository", str(tmp_path), *arguments], questions, tmp_path)
        assert done.returncode == 0, done.stderr
        scores = {s["id"]: s["score"] for s in map(json.loads, done.stdout.splitlines())}
        assert [scores[str(n)] for n in range(4)] == expected
    absent = bridge("ifbench", ["--repository", str(tmp_path / "nowhere")], [], tmp_path)
    assert absent.returncode == 1
    assert "no run_eval.py there; give a checkout of allenai/IFBench" in absent.stderr
