"""The process group of `distributed`: the trainer's rank 0, and the tensor-parallel ranks of every server.

The trainer's own groups are not touched, and the servers need not have been started together. Built as the servers
build theirs (sglang.srt.utils.init_custom_process_group), which torch has no public call for.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from megatron_mopd.rollout.sglang.http import ServerConnection, ServerRefused
from megatron_mopd.rollout.sync.recipients import Recipients

_POLL_SECONDS = 0.001
_JOIN_SECONDS = 60.0
"""At most, until all servers have joined: of one that died meanwhile nothing is heard here."""
_COLLATERAL = ("Failed to receive weights", "Failed to initialize custom process group")


class BroadcastFailed(RuntimeError):
    """The group broke while weights were sent; its servers hold parts of two versions."""


class UpdateGroup:
    """From `join` to `leave`. `urls`: the servers in it."""

    def __init__(self, process_group: ProcessGroup, name: str, urls: frozenset[str]):
        self.urls = urls
        self.name = name
        self._process_group = process_group

    @classmethod
    def join(cls, recipients: Recipients, backend: str, timeout: float) -> UpdateGroup:
        """Make the group together with all live recipients. BroadcastFailed where one cannot; it drops out."""
        limit = min(timeout, _JOIN_SECONDS)
        host = own_address(list(recipients.live))
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit))
        # A name of its own for every group: servers keep the name of one that a dead trainer left behind.
        name = f"mopd-{secrets.token_hex(8)}"
        offsets, size = _offsets(recipients)
        invitation = {
            "master_address": host,
            "master_port": store.port,
            "world_size": size,
            "group_name": name,
            "backend": backend,
        }

        def ask(server: ServerConnection) -> None:
            server.post(
                "/init_weights_update_group", invitation | {"rank_offset": offsets[server.url]}, timeout=timeout
            )

        problem: str | None = None
        with recipients.asking(ask) as answers:
            try:
                group = cls(_new_group(backend, store, size, name, timeout), name, frozenset(recipients.live))
            except RuntimeError as error:
                problem = _first_line(error)
            # The servers that wait in vain for one that died hear of it when the store ends; the group keeps its own.
            del store
        recipients.drop_failed(answers, is_collateral)
        if problem is not None:
            raise BroadcastFailed(f"no group: {problem}")
        if group.urls != recipients.live.keys():
            group.leave(recipients, timeout)
            raise BroadcastFailed("no group: a server failed")
        return group

    def broadcast(self, data: Tensor, answers: Mapping[str, Future[Any]], timeout: float) -> None:
        """Send `data` to every server, each of which was asked to receive it by the request behind its answer.

        Raises BroadcastFailed as soon as one of them cannot: the group is of no use then.
        """
        deadline = time.monotonic() + timeout
        try:
            work = dist.broadcast(data, src=0, group=self._process_group, async_op=True)
            assert work is not None
            while not work.is_completed():
                if any(future.done() and future.exception() for future in answers.values()):
                    raise BroadcastFailed("a server refused a bucket")
                if time.monotonic() > deadline:
                    raise BroadcastFailed(f"a broadcast took more than {timeout:g} s")
                time.sleep(_POLL_SECONDS)
            work.wait()
        except BroadcastFailed:
            raise
        except RuntimeError as error:
            raise BroadcastFailed(_first_line(error)) from None

    def leave(self, recipients: Recipients, timeout: float) -> None:
        """Give the group up, on this side and on the live servers'; one that cannot drops out."""

        def ask(server: ServerConnection) -> None:
            if server.url not in self.urls:
                return
            # ServerRefused: it was started anew since then, and has no such group.
            with contextlib.suppress(ServerRefused):
                server.post("/destroy_weights_update_group", {"group_name": self.name}, timeout=timeout)

        # Both at once: a server that waits in a broadcast hears of the end by the connection that closes, and this
        # side, where it waits for a server that refused to receive, by that server's.
        with recipients.asking(ask) as answers:
            dist.destroy_process_group(self._process_group)
            del self._process_group
        recipients.drop_failed(answers)


def is_collateral(error: BaseException) -> bool:
    """Whether a server only says that the group broke: the fault of another member of it."""
    return isinstance(error, ServerRefused) and any(text in str(error) for text in _COLLATERAL)


def _new_group(backend: str, store: dist.Store, size: int, name: str, timeout: float) -> ProcessGroup:
    # The servers put the group's name before the keys of the store once more than torch does.
    group, _ = c10d._new_process_group_helper(
        size,
        0,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=timeout),
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def _offsets(recipients: Recipients) -> tuple[dict[str, int], int]:
    """({url: rank of its first tensor-parallel rank}, ranks in all); rank 0 is the trainer."""
    offsets: dict[str, int] = {}
    size = 1
    for url in recipients.live:
        offsets[url] = size
        size += recipients.facts[url].tensor_ranks
    return offsets, size


def own_address(urls: list[str]) -> str:
    """The address of this machine under which all servers reach it; the loopback's where all of them are here."""
    hosts = [urlsplit(url).hostname or "" for url in urls]
    for host in hosts:
        # No packet is sent: connecting a datagram socket only asks the routing table.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address: str = probe.getsockname()[0]
        if not address.startswith("127."):
            return address
    return "127.0.0.1"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
