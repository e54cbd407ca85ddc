"""Multi-teacher on-policy distillation (MOPD) with Megatron-Core for the student and all teachers."""

__version__ = "0.1.0"
