"""IFEval (arXiv 2311.07911): whether a response follows the instructions that its prompt gives, decided by rules."""

from megatron_mopd.domains.ifeval.instructions import Instruction, read_instructions
from megatron_mopd.domains.ifeval.verdict import Accuracy, Verdict, accuracy, judge

__all__ = ["Accuracy", "Instruction", "Verdict", "accuracy", "judge", "read_instructions"]
