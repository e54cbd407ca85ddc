"""Write configs/tiny/held_out_text.jsonl: held-out questions of the tiny domains with their right answers, as texts.

    python configs/tiny/build_text.py

What `evaluation.perplexity` of reproduce.yaml reads: how likely a model finds right answers it was never shown. Runs
keep the same questions out of their training, since they are those of the evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mopd.config import load_config
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.tokenizer import Tokenizer

FOLDER = Path("configs/tiny")
PER_DOMAIN = 100


def texts() -> list[str]:
    config = load_config(FOLDER / "mopd.yaml")
    tokenizer = Tokenizer.load(FOLDER / "model")
    mixer = DomainMixer(config, tokenizer)
    end = tokenizer.decode([tokenizer.stop_ids[0]], keep_special=True)
    return [
        tokenizer.decode(prompt.token_ids, keep_special=True) + prompt.answer + end
        for domain in config.domains
        for prompt in mixer.held_out(domain)[:PER_DOMAIN]
    ]


if __name__ == "__main__":
    lines = [json.dumps({"text": text}) for text in texts()]
    (FOLDER / "held_out_text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
