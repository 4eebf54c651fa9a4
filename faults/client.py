"""Thousands of clients in one process: HTTP/1.1 by hand, a connection each, as the SDK holds them. And who watches how
the server is meanwhile, from a process of its own: the loop of the thousands would count its own delays."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from faults.live import KEY, MODEL
from faults.server import Server

_PROBE_INTERVAL_S = 0.02
TOKENS = [10, 20, 30, 40, 50]


class Client:
    """One connection of one tenant, opened at its first request and after it was lost."""

    def __init__(self, server: Server, tenant: int = 0) -> None:
        self._server = server
        self._key = KEY.format(tenant)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, route: str, **fields: Any) -> tuple[int, Any]:
        """Status and JSON. Raises OSError or IncompleteReadError where the connection ends."""
        try:
            return await self._post(route, json.dumps(fields).encode())
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            raise

    async def _post(self, route: str, body: bytes) -> tuple[int, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._server.port)
        reader, writer = self._streams
        writer.write(head(f"/api/v1/{route}", self._key, len(body)) + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(answer[9:12]), json.loads(await reader.readexactly(length))

    async def settled(self, request_id: str) -> dict[str, Any]:
        """Polls as the SDK does: again at once after a 408 or 5xx, with growing pauses while nobody is there. What it
        ends with has ``error`` if the future failed or is gone."""
        pause_s = 1.0
        while True:
            try:
                status, answer = await self.post("retrieve_future", request_id=request_id)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 30.0)
                continue
            if status not in (408, 429) and status < 500:
                return answer if status == 200 else {"error": f"{status}: {answer}"}
            if status != 408:
                await asyncio.sleep(0.1)

    async def done(self, route: str, **fields: Any) -> dict[str, Any]:
        """The result of a call whose answer is a future."""
        return await self.settled(await self.accepted(route, **fields))

    async def accepted(self, route: str, **fields: Any) -> str:
        status, answer = await self.post(route, **fields)
        if status != 200:
            raise RuntimeError(f"{route}: {status} {answer}")
        return str(answer["request_id"])

    async def run(self) -> str:
        """A new run in a session of its own."""
        _, session = await self.post("create_session", tags=[], sdk_version="0")
        lora = {"rank": 4, "seed": 1}
        made = await self.done(
            "create_model", session_id=session["session_id"], model_seq_id=0, base_model=MODEL, lora_config=lora
        )
        return str(made["model_id"])

    async def sampler(self) -> str:
        _, session = await self.post("create_session", tags=[], sdk_version="0")
        _, made = await self.post(
            "create_sampling_session",
            session_id=session["session_id"],
            sampling_session_seq_id=0,
            base_model=MODEL,
        )
        return str(made["sampling_session_id"])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def head(path: str, key: str, num_bytes: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {num_bytes}\r\n\r\n"
    ).encode()


def loss(tokens: list[int]) -> dict[str, Any]:
    inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [len(tokens) - 1]}}
    datum = {"model_input": {"chunks": [{"tokens": tokens[:-1]}]}, "loss_fn_inputs": inputs}
    return {"data": [datum], "loss_fn": "cross_entropy"}


def allow_many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Watch:
    """How long ``healthz`` took, each time it was asked, in milliseconds; known once the watch has ended.
    ``overslept_ms``: by how much a short sleep was longer than asked for, which is the machine's doing."""

    def __init__(self) -> None:
        self.healthz_ms: list[float] = []
        self.overslept_ms: list[float] = []
        self.num_unanswered = 0


@contextmanager
def watching(server: Server) -> Iterator[Watch]:
    """Ask ``healthz`` fifty times a second, while the block runs."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_probe, args=(f"{server.url}/api/v1/healthz", theirs))
    process.start()
    ours.recv()  # it has begun
    watch = Watch()
    try:
        yield watch
    finally:
        ours.send(None)
        watch.healthz_ms, watch.overslept_ms, watch.num_unanswered = ours.recv()
        process.join()


def _probe(url: str, pipe: Connection) -> None:
    times_ms: list[float] = []
    overslept_ms: list[float] = []
    num_unanswered = 0
    with urlopen(url, timeout=30) as answer:  # the first takes this process 0.15 s of its own
        answer.read()
    pipe.send(None)
    while True:
        slept_from_s = time.perf_counter()
        if pipe.poll(_PROBE_INTERVAL_S):
            break
        began_s = time.perf_counter()
        overslept_ms.append((began_s - slept_from_s - _PROBE_INTERVAL_S) * 1e3)
        try:
            with urlopen(url, timeout=30) as answer:
                answer.read()
            times_ms.append((time.perf_counter() - began_s) * 1e3)
        except (URLError, TimeoutError, OSError):
            num_unanswered += 1
    pipe.send((times_ms, overslept_ms, num_unanswered))
