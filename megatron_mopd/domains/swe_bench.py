"""SWE-bench's own harness as a `verifier: command`.

    verifier: command
    command: [python, -m, megatron_mopd.domains.swe_bench, --max_workers, "8"]
    command_seconds: 7200

Takes the patch out of each response, writes the predictions file, runs `swebench.harness.run_evaluation` (package
`swebench`, which needs Docker) and scores 1 where the harness says resolved. Every argument is handed to the
harness, paths absolute; without --dataset_name it is SWE-bench Verified. Samples of one instance are evaluated one
after another, because a predictions file holds one patch per instance.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_mopd.domains.command import Question, by_sample, read_questions, write_scores
from megatron_mopd.domains.reasoning import after_reasoning

DATASET = "princeton-nlp/SWE-bench_Verified"
_FENCED = re.compile(r"^```(?:diff|patch)[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BARE = re.compile(r"^(?:diff --git |--- (?:a/|/dev/null))", re.MULTILINE)


def extract_patch(response: str) -> str:
    """The last ```diff block of the answer, or all from its first diff header on; '' when there is neither."""
    answer = after_reasoning(response)
    fenced = _FENCED.findall(answer)
    if fenced:
        return str(fenced[-1])
    start = _BARE.search(answer)
    return answer[start.start() :].rstrip() + "\n" if start else ""


def resolved(questions: Sequence[Question], arguments: Sequence[str]) -> dict[str, float]:
    """id -> 1.0 where the harness reports the instance as resolved; SystemExit when the harness itself fails."""
    scores = {question.id: 0.0 for question in questions}
    patches = {question.id: extract_patch(question.response) for question in questions}
    tried = [question for question in questions if patches[question.id].strip()]
    for group in by_sample(tried, _instance):
        reports = _run_harness({_instance(question): patches[question.id] for question in group}, arguments)
        scores |= {question.id: float(reports.get(_instance(question), False)) for question in group}
    return scores


def _instance(question: Question) -> str:
    instance = question.record.get("instance_id")
    if not isinstance(instance, str):
        sys.exit(f'{question.id}: no "instance_id" in its line; `mopd benchmark swe_bench_verified` writes it')
    return instance


def _run_harness(patches: dict[str, str], arguments: Sequence[str]) -> dict[str, bool]:
    """instance -> resolved; an instance without a report (its patch did not apply) is left out."""
    with tempfile.TemporaryDirectory(prefix="mopd-swe-bench-") as folder:
        predictions = Path(folder, "predictions.jsonl")
        lines = [
            {"instance_id": instance, "model_name_or_path": "student", "model_patch": patch}
            for instance, patch in patches.items()
        ]
        predictions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        dataset = [] if "--dataset_name" in arguments else ["--dataset_name", DATASET]
        command = [sys.executable, "-m", "swebench.harness.run_evaluation", *dataset, *arguments]
        # Ranks run at the same time: the harness names its containers by the instance and this id.
        run_id = Path(folder).name
        command += ["--predictions_path", str(predictions), "--run_id", run_id]
        # It writes its logs under the current folder, and its progress to standard output.
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
        if done.returncode:
            sys.exit(f"swebench.harness.run_evaluation ended with code {done.returncode}; see its lines above")
        reports = {}
        for instance in patches:
            report = Path(folder, "logs/run_evaluation", run_id, "student", instance, "report.json")
            if report.is_file():
                reports[instance] = bool(json.loads(report.read_text(encoding="utf-8"))[instance]["resolved"])
        return reports


def main(arguments: Sequence[str]) -> None:
    if importlib.util.find_spec("swebench") is None:
        sys.exit("the package swebench is not installed; `pip install swebench`, and start Docker")
    write_scores(resolved(read_questions(sys.stdin), arguments), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
