"""The text that perplexity is measured on, cut into windows. Needs no Megatron, so that preflight can check it.

Documents longer than the window are scored as Hugging Face describes for models of a fixed length: windows that
overlap, each token counted once, with at least half a window before it where the document has that much.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_mopd.student.architecture import Architecture
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import IntArray, Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError

WINDOW = 2048
"""Tokens that are scored together, or the model's positions where it has fewer. A constant, so that figures of
different runs can be compared."""


TEXT = Prompt(id="text", domain="text", token_ids=np.zeros(0, np.int64), answer="", max_response_tokens=0)


def read_documents(path: Path) -> list[str]:
    """The texts of a JSONL file of {"text": ...} lines; other keys are ignored, blank lines skipped.

    Raises ConfigError with file and line for a broken one, and for a file without any.
    """
    documents = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    documents.append(_parse_line(raw, f"evaluation.perplexity: {path}:{number}"))
    except OSError as error:
        raise ConfigError(
            f"evaluation.perplexity: {path}: {error.strerror}; name a JSONL file, or set it to null"
        ) from None
    if not documents:
        raise ConfigError(f'evaluation.perplexity: {path} is empty; give {{"text": ...}} lines')
    return documents


def _parse_line(raw: bytes, where: str) -> str:
    try:
        line = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}") from None
    text = line.get("text") if isinstance(line, dict) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f'{where}: expected {{"text": a non-empty string}}')
    return text


def sliding_windows(document: IntArray, window: int) -> list[tuple[IntArray, int]]:
    """(tokens, first one to score) of the windows over a document [T]; together they score tokens 1 .. T-1 once.

    Windows start half a window apart, the last one is cut short.
    """
    stride = max(1, window // 2)
    windows = []
    scored = 1
    for start in range(0, len(document), stride):
        end = min(start + window, len(document))
        if end > scored:
            windows.append((document[start:end], scored - start))
            scored = end
    return windows


def read_windows(path: Path, arch: Architecture, tokenizer: Tokenizer) -> list[Rollout]:
    """The file's windows as sequences whose scored tokens have `loss_mask`. ConfigError when there is none."""
    size = min(WINDOW, arch.max_positions)
    windows = []
    for number, text in enumerate(read_documents(path), start=1):
        token_ids = tokenizer.encode(text)
        if len(token_ids) and int(token_ids.max()) >= arch.vocab_size:
            raise ConfigError(
                f"evaluation.perplexity: {path}: document {number} has token id {token_ids.max()}, the model's"
                f" vocabulary {arch.vocab_size}; use the model's own tokenizer"
            )
        windows += [_sequence(tokens, first) for tokens, first in sliding_windows(token_ids, size)]
    if not windows:
        raise ConfigError(f"evaluation.perplexity: {path}: no document has two tokens; give longer texts")
    return windows


def _sequence(token_ids: IntArray, first: int) -> Rollout:
    return Rollout(
        prompt=TEXT,
        sample=0,
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= first,
        rollout_logprobs=np.zeros(len(token_ids), np.float32),
        policy_version=0,
        finish_reason="stop",
    )
