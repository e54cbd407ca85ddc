"""The prompts of an audit, and whether others render them to the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mopd.audit.options import Options
from megatron_mopd.config import RunConfig
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.domains.splits import chat_of, render_prompt
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError, ServerRefused
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.tokenizer import Message, Tokenizer
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError

Render = Callable[[Sequence[Message]], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    chat: tuple[Message, ...]
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How one other tokenizer and chat template renders the prompts."""

    by: str
    prompts: int
    differing: int
    first: str = ""
    """Where the first one that differs parts from ours, in words."""


def draw_questions(
    config: RunConfig, settings: Options, tokenizer: Tokenizer, arch: Architecture
) -> Iterator[Question]:
    """The first held-out prompts of every domain; of a domain with an environment its first turn."""
    mixer = DomainMixer(config, tokenizer)
    for name, spec in config.domains.items():
        found = 0
        for index, item in mixer.questions(name, "held_out"):
            identity = f"{name}/held_out/{index}"
            prompt = render_prompt(
                item, spec, domain=name, identity=identity, answer="", question="", tokenizer=tokenizer
            )
            if prompt is None:
                continue
            # One position is left for the token that a re-scoring request generates.
            room = arch.max_positions - len(prompt.token_ids) - 1
            length = min(settings.tokens, prompt.max_response_tokens, room)
            if length < 1:
                continue
            yield Question(chat=tuple(chat_of(item, spec)), prompt=replace(prompt, max_response_tokens=length))
            found += 1
            if found == settings.prompts:
                break
        if not found:
            raise ConfigError(f"domains.{name}: no held-out prompt leaves room for an answer; lower max_prompt_tokens")


def by_transformers(folder: Path) -> Render:
    """As transformers renders with the tokenizer of `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def render(chat: Sequence[Message]) -> list[int]:
        text = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return render


def by_server(server: ServerConnection) -> Render:
    """As an SGLang server does for chat requests; raises ServerError."""

    def render(chat: Sequence[Message]) -> list[int]:
        answer = server.post("/tokenize", {"messages": list(chat), "add_generation_prompt": True})
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise ServerError(server.url, f"/tokenize: no tokens in {str(answer)[:80]!r}")
        return tokens

    return render


def compare_renderings(by: str, render: Render, questions: Sequence[Question], tokenizer: Tokenizer) -> Rendering:
    """A server that refuses counts as one that renders differently, and is quoted."""
    first, differing = "", 0
    for question in questions:
        ours = question.prompt.token_ids.tolist()
        try:
            theirs = render(question.chat)
        except ServerRefused as refused:
            return Rendering(by=by, prompts=len(questions), differing=len(questions), first=str(refused))
        if theirs != ours:
            differing += 1
            first = first or f"{question.prompt.id} {_parting(ours, theirs, tokenizer)}"
    return Rendering(by=by, prompts=len(questions), differing=differing, first=first)


def _parting(ours: Sequence[int], theirs: Sequence[int], tokenizer: Tokenizer) -> str:
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        at = min(len(ours), len(theirs))
    texts = [tokenizer.decode(ids[at : at + 6], keep_special=True) for ids in (ours, theirs)]
    return f"from token {at}: ours {texts[0]!r}, theirs {texts[1]!r}"
