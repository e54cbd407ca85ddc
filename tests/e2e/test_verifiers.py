"""RL on two ranks with the verifiers `ifeval` and `command`: rewards arrive, and a program's failure ends the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_mopd.cli import main
from tests.e2e.conftest import run_tree, write_run

PROGRAM = """
import json, sys
questions = [json.loads(line) for line in sys.stdin]
if len(sys.argv) > 1 and questions:
    sys.exit("the harness is down")
for q in questions:
    with open(f"{sys.argv[0]}.{q['id'].replace('/', '_')}.txt", "a") as log:
        print(q["response"], file=log)
    print(json.dumps({"id": q["id"], "score": 0.25 if q["id"].endswith("#0") else 0.75}))
"""


def rl_tree(models: Path, folder: Path) -> dict:
    lines = [
        {
            "prompt": f"{n} words.",
            "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
            "kwargs": [{}, {}],
        }
        for n in range(60)
    ]
    (folder / "follow.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "program.py").write_text(PROGRAM)
    tree = run_tree(models, folder / "run")
    shared = {"max_prompt_tokens": 24, "max_response_tokens": 8}
    tree |= {
        "stage": "rl",
        "steps": 2,
        "prompts_per_step": 8,
        "domains": {
            "follow": {"source": {"jsonl": str(folder / "follow.jsonl")}, "verifier": "ifeval", **shared},
            "program": {
                "source": tree["domains"]["b"]["source"],
                "verifier": "command",
                "command": [sys.executable, str(folder / "program.py")],
                **shared,
            },
        },
        "objective": {"kind": "grpo"},
        "rollout": {"samples_per_prompt": 2},
        "evaluation": {"prompts": 4, "every": 0},
    }
    del tree["teachers"]
    return tree


def test_rewards_of_both(models: Path, tmp_path: Path) -> None:
    assert main(["run", str(write_run(tmp_path / "run.yaml", rl_tree(models, tmp_path)))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/program" in line]
    assert [line["reward/program"] for line in steps] == [0.5, 0.5]
    assert all(0 < line["reward/follow"] <= 1 for line in steps)  # random text: few commas, no quotation marks
    # Two steps with four prompts of this domain and two samples each, every one judged once on one of the ranks.
    judged = sorted(path.name for path in tmp_path.glob("program.py.program_*.txt"))
    assert judged == [f"program.py.program_{n}#{sample}.txt" for n in range(8) for sample in range(2)]
    assert all(len(path.read_text().splitlines()) >= 1 for path in tmp_path.glob("program.py.program_*.txt"))


def test_a_failing_program_ends_the_run(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = rl_tree(models, tmp_path)
    tree["domains"]["program"]["command"].append("fail")
    code = main(["run", str(write_run(tmp_path / "run.yaml", tree))])
    assert code == 2
    line = capfd.readouterr().err.strip()
    assert line.startswith("mopd: error: domains.program.command: ")
    assert line.endswith("program.py fail' ended with code 1: the harness is down")
