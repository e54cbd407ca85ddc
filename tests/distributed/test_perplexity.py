"""Perplexity on Megatron equals that of transformers, in every layout and for any micro-batch size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_mopd.config import ParallelSpec
from megatron_mopd.evaluation.perplexity import Perplexity, checkpoint_perplexity
from megatron_mopd.parallel import cpu
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.student.random_init import write_random_model
from megatron_mopd.tokenizer import Tokenizer
from tests import tiny
from tests.distributed.ranks import run_ranks

cpu.install()

MODEL = Path(__file__).parents[2] / "configs" / "tiny" / "model"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "0123456789", "and", "so", "on"]
DOCUMENTS = [" ".join(WORDS[(7 * i * i + n) % len(WORDS)] for i in range(n)) for n in (3, 90, 1, 40, 150)]
LAYOUTS = {  # TP, PP, CP, EP -> world
    (1, 1, 1, 1): 1,
    (1, 1, 1, 2): 2,
    (2, 1, 1, 1): 2,
    (1, 2, 1, 1): 2,
    (2, 2, 1, 2): 8,
    (1, 1, 2, 2): 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with 256 positions, and texts of which the longest needs several windows."""
    root = tmp_path_factory.mktemp("perplexity")
    source = root / "source"
    source.mkdir()
    for file in MODEL.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
    (source / "config.json").write_text(json.dumps(config))
    write_random_model(root / "model", source, 3)
    (root / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[float, int]:
    """(perplexity, tokens) as the documentation of transformers computes it for models of a fixed length."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    tokenizer, window = Tokenizer.load(folder / "model"), model.config.max_position_embeddings
    total, count = 0.0, 0
    for text in DOCUMENTS:
        ids = torch.from_numpy(tokenizer.encode(text))[None]
        before = 0
        for begin in range(0, ids.shape[1], window // 2):
            end = min(begin + window, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : before - begin] = -100
            with torch.no_grad():
                logits = model(ids[:, begin:end]).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
            total += float(nll)
            count += int((labels[0, 1:] != -100).sum())
            before = end
            if end == ids.shape[1]:
                break
    assert before > window  # the longest document did not fit
    return math.exp(total / count), count


def measure(folder: Path, parallel: ParallelSpec, max_tokens: int) -> Perplexity:
    from megatron_mopd.parallel.runtime import start_world, stop_world

    config = tiny.run_config(folder, parallel=parallel, max_tokens=max_tokens)
    world = start_world(parallel, 0)
    model = folder / "model"
    result = checkpoint_perplexity(
        folder / "t.jsonl", config, read_architecture(model), model, Tokenizer.load(model), world
    )
    stop_world()
    return result


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(map(str, layout)))
def test_perplexity_equals_that_of_transformers(
    layout: tuple[int, int, int, int], folder: Path, expected: tuple[float, int]
) -> None:
    tp, pp, cp, ep = layout
    parallel = ParallelSpec(tensor=tp, pipeline=pp, context=cp, expert=ep)
    for max_tokens in (4096, 300):
        results = run_ranks(measure, LAYOUTS[layout], folder, parallel, max_tokens, init=False)
        assert len(set(results)) == 1
        assert results[0].tokens == expected[1]
        assert results[0].value == pytest.approx(expected[0], rel=1e-5)
    assert expected[0] > 10  # a random model: not 1
