"""What a run has cost: tokens and seconds, so that "the same budget" is a number and not a claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mopd.metrics import read_records
from megatron_mopd.types import Rollout
from megatron_mopd.yaml_config import ConfigError

TOKENS = ("generated", "trained", "teacher")
"""`tokens/<name>` of each train line in metrics.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Of one run, or of several: they add up. Evaluation, saving and starting do not count."""

    generated_tokens: int = 0
    """Tokens sampled for training, those of dropped groups among them; no prompt tokens."""
    trained_tokens: int = 0
    """Tokens, prompt and response, that went forward and backward through the student."""
    teacher_tokens: int = 0
    """Tokens, prompt and response, that went forward through a teacher to be scored."""
    seconds: float = 0.0

    def __add__(self, other: Compute) -> Compute:
        return Compute(
            generated_tokens=self.generated_tokens + other.generated_tokens,
            trained_tokens=self.trained_tokens + other.trained_tokens,
            teacher_tokens=self.teacher_tokens + other.teacher_tokens,
            seconds=self.seconds + other.seconds,
        )

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def token_metrics(rollouts: Sequence[Rollout], *, generated: int, has_teachers: bool) -> dict[str, float]:
    """The `tokens/...` of one step. generated: tokens sampled for it, by whomever."""
    processed = sum(len(rollout.token_ids) for rollout in rollouts)
    counts = (generated, processed, processed if has_teachers else 0)
    return {f"tokens/{name}": float(count) for name, count in zip(TOKENS, counts, strict=True)}


def read_compute(run_dir: Path) -> Compute:
    """The sums over a run's metrics.jsonl, which has every step once however often the run was resumed.

    Raises ConfigError for a folder that is no run's, and for a run of a version that did not count tokens.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; name the folder of a run that has begun")
    total = Compute()
    for record in read_records(path):
        try:
            generated, trained, teacher = (round(record[f"tokens/{name}"]) for name in TOKENS)
            seconds = record["seconds/total"]
        except KeyError as error:
            raise ConfigError(
                f"{path}: step {record['step']} has no {error.args[0]}: written by an older version; run it again"
            ) from None
        total += Compute(generated_tokens=generated, trained_tokens=trained, teacher_tokens=teacher, seconds=seconds)
    return total
