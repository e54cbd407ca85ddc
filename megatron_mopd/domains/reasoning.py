"""Where a response's reasoning ends and its answer begins."""

from __future__ import annotations


def after_reasoning(response: str) -> str:
    """The text after the last </think>, stripped; nothing when a <think> was not closed."""
    if "</think>" not in response and "<think>" in response:
        return ""
    return response.rpartition("</think>")[2].strip()
