"""The streaming conversion, on a model whose largest tensors outweigh everything else that a rank needs for it."""

from __future__ import annotations

from pathlib import Path

from megatron_mopd.student.hf_files import content_hash
from tests.distributed.full_width import FULL_WIDTH, through_megatron, write_synthetic
from tests.distributed.ranks import run_ranks

MEGABYTE = 1 << 20


def test_conversion_there_and_back_is_exact_and_streams(tmp_path: Path) -> None:
    """A quarter of the width; all 128 experts. The whole model is 210 MB, the embedding 46, a layer's experts 50."""
    config = FULL_WIDTH | {"hidden_size": 512, "moe_intermediate_size": 128, "vocab_size": 45_001}
    write_synthetic(tmp_path / "in", config)
    ranks = run_ranks(through_megatron, 2, tmp_path / "in", tmp_path / "out", init=False)
    assert content_hash(tmp_path / "in") == content_hash(tmp_path / "out")
    for memory in ranks:
        assert 90 * MEGABYTE < memory.shard < 110 * MEGABYTE
        # 40 to 55 of this is one tensor whole, the rest the allocator's and gloo's. Mapped files alone would add 100.
        assert memory.peak < memory.shard + 180 * MEGABYTE
