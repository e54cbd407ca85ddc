"""The contract of a rollout engine: prompts in, finished rollouts out, weights pushed in between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_mopd.student.architecture import Architecture
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError


class RolloutFailure(ConfigError):
    """Nothing answers prompts any more, for a reason outside of this program: the run saves what it has and stops.

    One line for the user. Raised on every rank.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Raises ValueError when a number is out of range."""

    temperature: float
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 1.0
    """Fewest most probable tokens with at least this mass (after top_k, renormalised); 1 is no limit."""
    top_k: int = 0
    """Number of most probable tokens; 0 is no limit."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: must be >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be >= 0 (0 is no limit), got {self.top_k}")


def check_prompt(prompt: Prompt, arch: Architecture) -> None:
    """Raise ValueError, naming the prompt, for one that a model of these shapes cannot continue."""
    length, response = len(prompt.token_ids), prompt.max_response_tokens
    if length == 0:
        raise ValueError(f"prompt {prompt.id}: has no tokens")
    if response < 1:
        raise ValueError(f"prompt {prompt.id}: max_response_tokens must be >= 1, got {response}")
    if length + response > arch.max_positions:
        raise ValueError(
            f"prompt {prompt.id}: {length} tokens and a response of up to {response} do not fit "
            f"the model's {arch.max_positions} positions"
        )
    low, high = int(prompt.token_ids.min()), int(prompt.token_ids.max())
    if low < 0 or high >= arch.vocab_size:
        raise ValueError(f"prompt {prompt.id}: token ids {low}..{high} leave the vocabulary of {arch.vocab_size}")


class RolloutEngine(Protocol):
    """Continues prompts with the current weights of the student."""

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """Return `len(prompts) * samples` rollouts: all samples of the first prompt, then of the second, ...

        A response ends with the first stop token, which belongs to it (`loss_mask` True, finish_reason
        `stop`), or after the prompt's `max_response_tokens` (finish_reason `length`).

        `rollout_logprobs` are log softmax(logits / temperature) of the sampled token, before top-p and top-k:
        with temperature 1 the model's own. Greedy decoding reports those of temperature 1.

        The randomness of a token depends on (seed, prompt.id, sample, its index in the response) only: up to
        floating-point rounding a rollout is the same in any batch, order and number of ranks.

        Raises ValueError, naming the prompt, for one that cannot be continued within the model's positions.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by a stream of full tensors under their Hugging Face names.

        `version` becomes the `policy_version` of the rollouts that follow. Raises ValueError naming what is
        missing, unexpected or of the wrong shape; the engine then refuses to generate until a load succeeds.
        """
        ...

    def rest(self) -> None:
        """No prompts come until the next `load_weights`: memory may be given up for the update."""
        ...
