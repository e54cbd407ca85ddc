"""The options of `mopd audit`. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_mopd.yaml_config import require

FP32_TOLERANCE = 1e-4
"""Of max |difference| of log-probs, in nats: what float32 leaves between two right implementations."""
BF16_TOLERANCE = 2e-3
"""Of KL(mu || p_train), estimated by k3. Healthy bf16 engines are below: 6.4e-4 dense, 1.5e-3 Qwen3-30B-A3B without
routing replay (arXiv 2510.11370)."""
BF16_MAX = 1.0
"""Of max |difference| in bf16: one flipped expert moves one token a lot, but not by a factor of e."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line but for CONFIG and its overrides."""

    prompts: int = 8
    """Of every domain."""
    tokens: int = 64
    """Longest answer, where the domain allows as many."""
    reference: bool = False
    tolerance: float | None = None
    """float32: of max |difference|; bfloat16: of KL(mu || p_train)."""
    json_file: str | None = None

    def __post_init__(self) -> None:
        require(self.prompts >= 1, f"--prompts: must be >= 1, got {self.prompts}")
        require(self.tokens >= 1, f"--tokens: must be >= 1, got {self.tokens}")
        require(self.tolerance is None or self.tolerance > 0, f"--tolerance: must be > 0, got {self.tolerance}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Both must hold. Nats."""

    largest: float
    kl: float

    @classmethod
    def of(cls, dtype: str, given: float | None) -> Tolerance:
        if dtype == "float32":
            return cls(largest=given or FP32_TOLERANCE, kl=given or FP32_TOLERANCE)
        return cls(largest=BF16_MAX, kl=given or BF16_TOLERANCE)


def add(parser: argparse.ArgumentParser) -> None:
    unset = Options()
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a mopd or rl run")
    parser.add_argument(
        "--prompts", metavar="N", type=int, default=unset.prompts, help="of every domain; default: %(default)s"
    )
    parser.add_argument(
        "--tokens", metavar="N", type=int, default=unset.tokens, help="longest answer; default: %(default)s"
    )
    parser.add_argument("--reference", action="store_true", help="compare with transformers in float32, layer by layer")
    parser.add_argument(
        "--tolerance", metavar="X", type=float, help="float32: max difference; bfloat16: KL; default: 1e-4 and 2e-3"
    )
    parser.add_argument("--json", metavar="FILE", dest="json_file", help="write every figure there")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megatron_mopd.audit.command import run_audit

    names = ("prompts", "tokens", "reference", "tolerance", "json_file")
    return run_audit(arguments.config, overrides, Options(**{name: getattr(arguments, name) for name in names}))
