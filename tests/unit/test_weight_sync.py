"""What goes to the rollout servers, without a server: buckets, payloads, checksums, versions, the configuration."""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mopd.rollout.sync.buckets import Entry, flat_bytes, iter_buckets
from megatron_mopd.rollout.sync.checksum import ServerChecksums, Watched, difference
from megatron_mopd.rollout.sync.config import SyncSpec
from megatron_mopd.rollout.sync.payload import serialize
from megatron_mopd.rollout.sync.version import num_updates_of, weight_version
from megatron_mopd.yaml_config import ConfigError, build
from tests.distributed.ranks import run_ranks


def _weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(f"w{i}", torch.randn(shape, generator=generator).to(dtype)) for i, shape in enumerate(shapes)]


def test_buckets_hold_whole_tensors_in_order_and_within_the_limit() -> None:
    weights = _weights((4, 4), (8,), (2, 3), (50,), (1,))  # 64, 32, 24, 200, 4 bytes
    seen = [(bucket.entries, bucket.data.clone()) for bucket in iter_buckets(weights, max_bytes=100)]
    assert [[entry.name for entry in entries] for entries, _ in seen] == [["w0", "w1"], ["w2"], ["w3"], ["w4"]]
    assert [len(data) for _, data in seen] == [96, 24, 200, 4]
    assert seen[0][0][1] == Entry(name="w1", shape=(8,), dtype=torch.float32, begin=64, end=96)
    tensors = dict(weights)
    for entries, data in seen:
        for entry in entries:
            value = data[entry.begin : entry.end].view(entry.dtype).view(entry.shape)
            assert torch.equal(value, tensors[entry.name])


def test_a_bucket_has_one_dtype_and_takes_views_that_are_not_contiguous() -> None:
    whole = torch.arange(12, dtype=torch.float32).view(3, 4)
    weights = [("a", whole.T), ("b", whole[:, 1]), ("c", torch.ones(3, dtype=torch.bfloat16))]
    buckets = [(bucket.entries, bucket.data.clone()) for bucket in iter_buckets(weights, max_bytes=1000)]
    assert [[entry.name for entry in entries] for entries, _ in buckets] == [["a", "b"], ["c"]]
    assert torch.equal(buckets[0][1].view(torch.float32), torch.cat([whole.T.flatten(), whole[:, 1]]))
    assert torch.equal(buckets[1][1].view(torch.bfloat16), weights[2][1])


def _streamed_growth(total: int, one: int, bucket: int) -> tuple[int, int]:
    """(bytes that went through, bytes by which the process's peak of memory grew)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stream = ((f"w{i}", torch.full((one,), i % 251, dtype=torch.uint8)) for i in range(total // one))
    through = sum(len(bucket.data) for bucket in iter_buckets(stream, bucket))
    return through, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def test_a_stream_of_1_gib_never_takes_more_than_a_bucket_and_a_tensor() -> None:
    total, one, bucket = 1 << 30, 4 << 20, 32 << 20

    # Raise the peak of the forked process above that of its parent: only what comes after counts.
    def work() -> tuple[int, int]:
        torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
        return _streamed_growth(total, one, bucket)

    ((through, growth),) = run_ranks(work, 1, init=False)
    assert through == total
    assert growth < bucket + 3 * one


class _Restricted(pickle.Unpickler):
    """SGLang's SafeUnpickler, as far as our payloads go: a short list of globals, of which none is SGLang's own."""

    allowed = frozenset(
        {
            ("types", "SimpleNamespace"),
            ("torch", "Size"),
            ("torch", "float32"),
            ("torch", "bfloat16"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch.storage", "_load_from_bytes"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in self.allowed, f"{module}.{name}"
        return super().find_class(module, name)


def test_a_payload_is_the_same_beside_megatron_which_replaces_torchs_reader_of_storages() -> None:
    (bucket,) = iter_buckets(_weights((3, 4)), max_bytes=48)
    before = serialize(bucket)
    import megatron.core  # noqa: F401

    assert torch.storage._load_from_bytes.__module__.startswith("megatron.")  # type: ignore[attr-defined]
    assert serialize(bucket) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_payload_passes_the_restricted_unpickler_and_carries_only_its_bucket(dtype: torch.dtype) -> None:
    weights = _weights((30, 10), (7,), dtype=dtype)
    (bucket,) = iter_buckets(weights, max_bytes=1 << 20)
    raw = base64.b64decode(serialize(bucket))
    assert len(raw) < 307 * dtype.itemsize + 2500
    content = _Restricted(io.BytesIO(raw)).load()
    flat = content["flattened_tensor"]
    for meta, (name, tensor) in zip(content["metadata"], weights, strict=True):
        assert (meta.name, meta.shape, meta.dtype, meta.numel) == (name, tensor.shape, dtype, tensor.nbytes)
        assert torch.equal(flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape), tensor)


HEAD, HEADS, KV_HEADS, HIDDEN, VOCAB, EXPERTS, WIDE = 4, 4, 2, 8, 70, 2, 6


def _layer() -> Iterator[tuple[str, Tensor]]:
    """The tensors of one MoE layer and the embedding in the order of the stream."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        "model.layers.0.mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        name = f"model.layers.0.mlp.experts.{expert}"
        shapes |= {f"{name}.gate_proj.weight": (WIDE, HIDDEN), f"{name}.up_proj.weight": (WIDE, HIDDEN)}
        shapes |= {f"{name}.down_proj.weight": (HIDDEN, WIDE)}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        yield name, torch.randn(shape, generator=generator)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(flat_bytes(tensor).numpy().tobytes()).hexdigest()[:16]


def test_checksums_are_those_of_the_parameters_that_a_server_of_two_ranks_fuses_and_cuts() -> None:
    weights = dict(_layer())
    checksums = ServerChecksums(2, HEAD)
    stream = Watched(weights.items(), {2: checksums})
    assert [name for name, _ in stream] == list(weights)
    assert stream.num_bytes == sum(tensor.nbytes for tensor in weights.values())
    layer = "model.layers.0."
    q, k, v = (weights[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    experts = [
        [weights[f"{layer}mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")]
        for e in range(EXPERTS)
    ]
    second = {
        "model.embed_tokens.weight": torch.cat([weights["model.embed_tokens.weight"][64:], torch.zeros(58, HIDDEN)]),
        f"{layer}input_layernorm.weight": weights[f"{layer}input_layernorm.weight"],
        f"{layer}self_attn.qkv_proj.weight": torch.cat([q[8:], k[4:], v[4:]]),
        f"{layer}self_attn.o_proj.weight": weights[f"{layer}self_attn.o_proj.weight"][:, 8:],
        f"{layer}mlp.gate.weight": weights[f"{layer}mlp.gate.weight"],
        f"{layer}mlp.experts.w13_weight": torch.stack([torch.cat([g[3:], u[3:]]) for g, u, _ in experts]),
        f"{layer}mlp.experts.w2_weight": torch.stack([d[:, 3:] for _, _, d in experts]),
    }
    assert checksums.of_rank(1) == {name: _hash(tensor) for name, tensor in second.items()}


def test_ranks_beyond_the_key_value_heads_hold_copies_of_them() -> None:
    checksums = ServerChecksums(4, HEAD)
    weights = dict(_layer())
    for name, tensor in weights.items():
        if "q_proj" in name or "k_proj" in name or "v_proj" in name:
            checksums.add(name, tensor)
    q, k, v = (weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    for rank, head in enumerate((0, 0, 1, 1)):
        own = torch.cat([q[4 * rank : 4 * rank + 4], k[4 * head : 4 * head + 4], v[4 * head : 4 * head + 4]])
        assert checksums.of_rank(rank) == {"model.layers.0.self_attn.qkv_proj.weight": _hash(own)}


def test_a_difference_names_rank_and_parameter() -> None:
    checksums = ServerChecksums(1, HEAD)
    for name, tensor in _layer():
        checksums.add(name, tensor)
    good = {"parallelism_info": [{"tp_rank": 0}], "checksums": checksums.of_rank(0)}
    assert difference(checksums, [good]) is None
    bad = good | {"checksums": {**checksums.of_rank(0), "model.layers.0.mlp.gate.weight": "0" * 16}}
    assert difference(checksums, [bad]) == "rank 0 holds another model.layers.0.mlp.gate.weight than was sent"
    unsent = good | {"checksums": checksums.of_rank(0) | {"lm_head.weight": "0" * 16}}
    assert difference(checksums, [unsent]) == "rank 0 holds another lm_head.weight than was sent"
    fewer = good | {"checksums": {}}
    assert difference(checksums, [good, fewer]) == (
        "rank 0 holds another model.embed_tokens.weight and 6 more than was sent"
    )


def test_versions_name_the_run() -> None:
    assert weight_version("a1b2", 17) == "a1b2:17"
    assert num_updates_of("a1b2:17", "a1b2") == 17
    for foreign in ("default", "ffff:17", "a1b2", "a1b2:", "a1b2:-1", "a1b2:1.5", "17"):
        with pytest.raises(ValueError, match=f"weight version '{foreign}' is not one of run 'a1b2'"):
            num_updates_of(foreign, "a1b2")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "ipc"}, "sync.kind: expected one of distributed, tensor, disk, got 'ipc'"),
        ({"bucket_mb": 0}, "sync: bucket_mb: must be >= 1"),
        ({"timeout_seconds": 0}, "sync: timeout_seconds: must be > 0"),
        ({"kind": "disk", "bucket_mb": 8}, "sync: bucket_mb: only for kind distributed or tensor, not 'disk'"),
        ({"kind": "tensor", "backend": "gloo"}, "sync: backend: only for kind distributed, not 'tensor'"),
        ({"folder": "/x"}, "sync: folder: only for kind disk, not 'distributed'"),
        ({"colocated": True}, "sync: colocated: only for kind tensor, not 'distributed'"),
    ],
)
def test_a_wrong_configuration_is_one_line(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(SyncSpec, tree, "sync")
    assert str(caught.value) == message


def test_a_right_configuration() -> None:
    assert build(SyncSpec, {}, "sync").bucket_bytes == 512 << 20
    assert build(SyncSpec, {"kind": "tensor", "bucket_mb": 2, "colocated": True}, "sync").bucket_bytes == 2 << 20
