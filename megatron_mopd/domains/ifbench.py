"""IFBench's own checkers (github.com/allenai/IFBench) as a `verifier: command`.

    verifier: command
    command: [python, -m, megatron_mopd.domains.ifbench, --repository, /path/to/IFBench]

Runs `run_eval` of a checkout whose requirements are installed. The score is the share of a prompt's instructions
that were followed, so that 1 means all: loose, as the paper reports (arXiv 2507.02833), or strict with --strict.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mopd.domains.command import Question, by_sample, read_questions, write_scores
from megatron_mopd.domains.reasoning import after_reasoning


def followed(questions: Sequence[Question], repository: Path, strict: bool) -> dict[str, float]:
    """id -> share of the instructions that were followed; SystemExit when `run_eval` fails."""
    scores: dict[str, float] = {}
    for group in by_sample(questions, lambda question: question.prompt):
        results = _run_eval(group, repository, "strict" if strict else "loose")
        for question in group:
            flags = results[question.prompt]["follow_instruction_list"]
            scores[question.id] = sum(flags) / len(flags)
    return scores


def _run_eval(questions: Sequence[Question], repository: Path, mode: str) -> dict[str, dict[str, Any]]:
    """prompt -> the line that `run_eval` writes about it."""
    inputs = [{"key": question.id, **question.record} for question in questions]
    responses = [{"prompt": question.prompt, "response": after_reasoning(question.response)} for question in questions]
    with tempfile.TemporaryDirectory(prefix="mopd-ifbench-") as folder:
        for name, lines in (("inputs", inputs), ("responses", responses)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "run_eval", f"--input_data={folder}/inputs.jsonl"]
        command += [f"--input_response_data={folder}/responses.jsonl", f"--output_dir={folder}/eval"]
        done = subprocess.run(command, cwd=repository, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
        if done.returncode:
            sys.exit(f"IFBench's run_eval ended with code {done.returncode}; see its lines above")
        found = next(Path(folder, "eval").glob(f"*eval_results_{mode}.jsonl"))
        results = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    return {result["prompt"]: result for result in results}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.domains.ifbench", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="checkout of allenai/IFBench")
    parser.add_argument("--strict", action="store_true", help="strict verdicts instead of loose ones")
    options = parser.parse_args(arguments)
    if not (options.repository / "run_eval.py").is_file():
        sys.exit(f"--repository {options.repository}: no run_eval.py there; give a checkout of allenai/IFBench")
    write_scores(followed(read_questions(sys.stdin), options.repository, options.strict), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
