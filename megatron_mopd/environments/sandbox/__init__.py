"""Runs Python snippets of a model's where they can do no harm. `Sandbox.open` finds what this machine offers for it."""

from megatron_mopd.environments.sandbox.isolation import ISOLATIONS, Isolation, Place
from megatron_mopd.environments.sandbox.sandbox import Sandbox, SandboxError, SandboxLimits, SandboxResult

__all__ = ["ISOLATIONS", "Isolation", "Place", "Sandbox", "SandboxError", "SandboxLimits", "SandboxResult"]
