"""A bucket as `update_weights_from_tensor` takes it: a pickle that SGLang's restricted unpickler lets through."""

from __future__ import annotations

import base64
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from megatron_mopd.rollout.sync.buckets import Bucket


def serialize(bucket: Bucket) -> str:
    """Base64 of a pickle of {'flattened_tensor': uint8 tensor, 'metadata': [name, shape, dtype, byte range]}.

    On the CPU the bytes are inside. On a GPU it is a CUDA IPC handle (not run here: no GPU), so the server must run on
    this machine, see this GPU under the same number, and the bucket must live until the server has answered.
    """
    # SGLang reads attributes only, and its unpickler allows this class: its own needs no import here.
    metadata = [
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=entry.dtype,
            start_idx=entry.begin,
            end_idx=entry.end,
            numel=entry.end - entry.begin,
        )
        for entry in bucket.entries
    ]
    buffer = io.BytesIO()
    if bucket.data.is_cuda:
        ForkingPickler(buffer).dump({"flattened_tensor": bucket.data, "metadata": metadata})
    else:
        # A view is pickled with all of its storage: what a bucket leaves unused of the buffer must not travel.
        data = bucket.data if bucket.data.numel() == bucket.data.untyped_storage().nbytes() else bucket.data.clone()
        _Pickler(buffer, protocol=5).dump({"flattened_tensor": data, "metadata": metadata})
    return base64.b64encode(buffer.getbuffer()).decode("ascii")


class _Pickler(pickle._Pickler):
    """Names torch's own reader of storages, whatever stands in its place: Megatron-Core puts one there that SGLang does
    not know, and its scheduler ends with an unpickling error."""

    def _save_function(self, function: Any, name: str | None = None) -> None:
        if function is torch.storage._load_from_bytes:
            self.save("torch.storage")  # type: ignore[attr-defined]
            self.save("_load_from_bytes")  # type: ignore[attr-defined]
            self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]
            self.memoize(function)  # type: ignore[attr-defined]
        else:
            self.save_global(function, name)  # type: ignore[attr-defined]

    dispatch = pickle._Pickler.dispatch | {FunctionType: _save_function}  # type: ignore[assignment]
