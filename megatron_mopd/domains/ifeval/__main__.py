"""`python -m megatron_mopd.domains.ifeval QUESTIONS RESPONSES`: IFEval's four accuracies of finished responses.

QUESTIONS: JSONL lines {"prompt", "instruction_id_list", "kwargs"}, the published ones or those of `mopd benchmark`.
RESPONSES: JSONL lines {"prompt", "response"}, as the published program takes them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_mopd.domains.ifeval import accuracy, judge, read_instructions
from megatron_mopd.domains.reasoning import after_reasoning
from megatron_mopd.yaml_config import ConfigError, read_text


def evaluate(questions: str, responses: str) -> dict[str, float]:
    """The accuracies over all questions. Raises ConfigError for a broken line or a question without a response."""
    answered = {line["prompt"]: line["response"] for _, line in _read(responses, ("prompt", "response"))}
    verdicts = []
    for where, line in _read(questions, ("prompt",)):
        if line["prompt"] not in answered:
            raise ConfigError(f"{where}: {responses} has no response to this prompt")
        instructions = read_instructions(line, where)
        verdicts.append(judge(after_reasoning(answered[line["prompt"]]), instructions))
    if not verdicts:
        raise ConfigError(f"{questions} is empty")
    return asdict(accuracy(verdicts)) | {"prompts": len(verdicts)}


def _read(path: str, texts: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(where, line) of each line that is not blank."""
    lines = []
    for number, raw in enumerate(read_text(path, "file").split("\n"), start=1):
        if raw.strip():
            where = f"{path}:{number}"
            try:
                line = json.loads(raw)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not a line of JSON: {error}") from None
            if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in texts):
                raise ConfigError(f"{where}: expected an object with the texts {', '.join(texts)}")
            lines.append((where, line))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mopd.domains.ifeval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("questions", metavar="QUESTIONS")
    parser.add_argument("responses", metavar="RESPONSES")
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(evaluate(arguments.questions, arguments.responses), indent=2))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
