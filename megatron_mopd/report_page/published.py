"""The results of MOPD (arXiv 2606.30406), Table 2 and the top-k row of its ablation, to be shown beside ours.

Qwen3-30B-A3B, one run a method, no intervals. The accuracies are the published ones, in per cent; the normalised
scores follow from them as in the paper: a domain's score is the mean of its benchmarks, the method's the mean of
the three domains'. The accuracies were taken from several independent notes on the paper that agree, not from its
own text; the mean scores that follow from them are those that the paper states, to four digits.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.report import mean, normalised

DOMAINS = {"Math": ("AIME25", "AIME26"), "IF": ("IFBench", "IFEval"), "SWE": ("SWE-bench Verified",)}
BENCHMARKS = tuple(name for names in DOMAINS.values() for name in names)


@dataclass(frozen=True, slots=True)
class Published:
    label: str
    accuracy: tuple[float, ...]
    """Per cent, in the order of BENCHMARKS."""

    def domain_accuracy(self) -> dict[str, float]:
        named = dict(zip(BENCHMARKS, self.accuracy, strict=True))
        return {domain: sum(named[name] for name in names) / len(names) for domain, names in DOMAINS.items()}

    def domain_scores(self) -> dict[str, float]:
        """Domain -> normalised score."""
        own, base, teacher = self.domain_accuracy(), BASE.domain_accuracy(), TEACHER.domain_accuracy()
        return {domain: normalised(own[domain], base[domain], teacher[domain]) for domain in DOMAINS}

    def score(self) -> float:
        return mean(self.domain_scores())


BASE = Published("Student (SFT)", (45.42, 54.48, 42.69, 84.17, 35.80))
TEACHER = Published("RL teacher of each domain", (54.79, 63.65, 78.40, 95.50, 51.20))
TABLE = {
    "average": Published("Param-Merge (average)", (47.81, 59.58, 53.74, 88.79, 39.60)),
    "task_arithmetic": Published("Param-Merge (task arithmetic)", (49.38, 63.96, 78.23, 95.81, 48.80)),
    "mix_rl": Published("Mix-RL", (52.71, 63.75, 75.00, 94.58, 48.80)),
    "cascade_rl": Published("Cascade RL", (48.54, 61.88, 77.11, 95.80, 47.80)),
    "off_policy": Published("Off-Policy Finetune", (51.56, 63.44, 80.95, 93.35, 45.80)),
    "mopd_sampled": Published("MOPD (policy gradient)", (51.46, 65.31, 77.89, 93.84, 50.40)),
}
"""Name of the method in our `reproduce.yaml` -> its row of Table 2. Our full-vocabulary `mopd` has none there."""
ABLATIONS = {"mopd_topk": Published("MOPD (top-k 64)", (51.77, 64.79, 75.85, 93.07, 50.20))}
