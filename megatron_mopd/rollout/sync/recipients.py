"""The servers of one weight update: asked all at once; one that fails drops out, and the others go on without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError


class UpdateRefused(ServerError):
    """A server's answer that rules it out: another weight version, another checksum, a layout we cannot serve."""


def never(error: BaseException) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What an update has to know about a server."""

    tensor_ranks: int
    expert_ranks: int
    on_cpu: bool
    weight_version: str
    """Of the weights it serves now; 'default' where it was started and never updated."""


class Recipients:
    """The servers that still take part, by URL. Each one's requests come one after another."""

    def __init__(self, servers: Sequence[ServerConnection]):
        self.live: dict[str, ServerConnection] = {server.url: server for server in servers}
        self.facts: dict[str, ServerFacts] = {}
        self.failed: dict[str, str] = {}
        """URL -> why it dropped out."""

    def ask[T](self, action: Callable[[ServerConnection], T]) -> dict[str, T]:
        """{url: what `action` returned}, of all live servers at once; those that fail drop out."""
        with self.asking(action) as answers:
            pass
        self.drop_failed(answers)
        return {url: answers[url].result() for url in self.live}

    @contextmanager
    def asking[T](self, action: Callable[[ServerConnection], T]) -> Iterator[Mapping[str, Future[T]]]:
        """Ask them while something else is done; the exit waits for the answers. `drop_failed` comes after."""
        with ThreadPoolExecutor(max(1, len(self.live)), thread_name_prefix="weight-sync") as pool:
            yield {url: pool.submit(action, server) for url, server in self.live.items()}

    def drop_failed(
        self, answers: Mapping[str, Future[Any]], innocent: Callable[[BaseException], bool] = never
    ) -> None:
        """Drop the servers that failed, but for those whose error is `innocent`: another server's fault."""
        for url, future in answers.items():
            error = future.exception()
            if error is None or innocent(error):
                continue
            if not isinstance(error, ServerError):
                raise error
            self.live.pop(url, None)
            self.failed.setdefault(url, error.reason)


def read_facts(server: ServerConnection) -> ServerFacts:
    """Raises UpdateRefused for layouts that weights cannot be sent to."""
    info, model = server.get("/server_info"), server.get("/model_info")
    with understanding(server):
        for key in ("pp_size", "dp_size"):
            if info[key] != 1:
                raise UpdateRefused(server.url, f"{key} is {info[key]}; start it with 1, and more servers instead")
        return ServerFacts(
            tensor_ranks=int(info["tp_size"]),
            expert_ranks=int(info["ep_size"]),
            on_cpu=info["device"] == "cpu",
            weight_version=str(model["weight_version"]),
        )


@contextmanager
def understanding(server: ServerConnection) -> Iterator[None]:
    """An answer without what SGLang puts there rules the server out, and says what is missing."""
    try:
        yield
    except (LookupError, TypeError) as error:
        raise UpdateRefused(server.url, f"not an answer of sglang 0.5.23: {error!r}") from None
