"""Clients that are slow, large or many, at the server's door."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from tuft.config import Config
from tuft.connections import HttpServer

LARGE = b"x" * 2**25
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Open = Callable[[], Any]


class Echo:
    """Answers with the length of the body; to /large with much, to /held once it is released."""

    def __init__(self) -> None:
        self.held = asyncio.Event()
        self.num_done = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            num_bytes += len(message["body"])
            more = message["more_body"]
        if scope["path"] == "/held":
            await self.held.wait()
        body = LARGE if scope["path"] == "/large" else str(num_bytes).encode()
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        for start in range(0, len(body), 2**20):
            part = body[start : start + 2**20]
            await send({"type": "http.response.body", "body": part, "more_body": start + len(part) < len(body)})
        self.num_done += 1


@asynccontextmanager
async def serving(app: Any, server: dict[str, Any], limits: dict[str, Any]) -> AsyncIterator[Open]:
    listener = socket.create_server(("127.0.0.1", 0))
    http = HttpServer(app, Config(server=server, limits=limits))
    task = asyncio.create_task(http.serve(sockets=[listener]))
    while not http.started:
        await asyncio.sleep(0.01)
    writers: list[Writer] = []

    async def connect(**options: Any) -> tuple[Reader, Writer]:
        reader, writer = await asyncio.open_connection(*listener.getsockname(), **options)
        writers.append(writer)
        return reader, writer

    yield connect
    for writer in writers:
        writer.transport.abort()
    http.should_exit = True
    await task
    listener.close()


async def answer(reader: Reader) -> tuple[int, Any]:
    """One response: its status and its body, of JSON."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def refusal(reader: Reader) -> tuple[int, str]:
    """One response after which the connection ends."""
    status, body = await answer(reader)
    assert await reader.read() == b""
    return status, body["detail"]


async def test_a_head_that_does_not_come_in_time_is_refused_with_the_limit() -> None:
    async with serving(Echo(), {"header_timeout_s": 0.2}, {}) as connect:
        for sent in (b"", b"GET / HT", GET[:-2]):
            reader, writer = await connect()
            writer.write(sent)
            assert await refusal(reader) == (408, "no complete head came within server.header_timeout_s, 0.2 s")


async def test_the_head_of_a_later_request_has_its_own_time() -> None:
    async with serving(Echo(), {"header_timeout_s": 0.2}, {}) as connect:
        reader, writer = await connect()
        writer.write(GET)
        assert await answer(reader) == (200, 0)
        await asyncio.sleep(0.3)  # between requests it may be idle
        writer.write(GET)
        assert await answer(reader) == (200, 0)
        writer.write(GET[:-2])
        assert (await refusal(reader))[0] == 408


async def test_a_head_over_the_limit_is_refused_with_its_number() -> None:
    detail = "head: it has more than 1024 bytes, which is limits.max_header_bytes"
    long = b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 1024
    many = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n"
    query = b"GET /?" + b"q" * 1024 + b" HTTP/1.1\r\n\r\n"
    async with serving(Echo(), {}, {"max_header_bytes": 1024}) as connect:
        for head in (long, long + b"\r\n\r\n", many, query):
            reader, writer = await connect()
            writer.write(head)
            assert await refusal(reader) == (431, detail)
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 900 + b"\r\n\r\n")
        assert await answer(reader) == (200, 0)


async def test_headers_behind_a_body_are_not_kept() -> None:
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Echo()(scope, receive, send)
        scopes.append(scope)

    async with serving(app, {}, {}) as connect:
        reader, writer = await connect()
        writer.write(
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + b"x: y\r\n" * 50 + b"\r\n"
        )
        assert await answer(reader) == (200, 1)
        assert len(scopes[0]["headers"]) == 1


async def test_a_body_that_drips_is_refused_with_the_limit() -> None:
    async with serving(Echo(), {"body_timeout_s": 0.2, "min_bytes_per_s": 1000}, {}) as connect:
        reader, writer = await connect()
        writer.write(POST % 10_000)

        async def drip() -> None:
            while True:
                writer.write(b"a")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        status, detail = await refusal(reader)
        dripping.cancel()
        assert status == 408
        assert "server.body_timeout_s, 0.2 s; server.min_bytes_per_s is 1000" in detail


async def test_a_body_that_comes_fast_enough_may_take_long() -> None:
    async with serving(Echo(), {"body_timeout_s": 0.2, "min_bytes_per_s": 100}, {}) as connect:
        reader, writer = await connect()
        writer.write(POST % 1000)
        for _ in range(10):
            writer.write(b"a" * 100)
            await asyncio.sleep(0.05)
        assert await answer(reader) == (200, 1000)


async def test_a_sender_who_is_kept_waiting_is_not_late() -> None:
    """The second request waits behind the first, and the server does not read on."""
    app = Echo()
    async with serving(app, {"body_timeout_s": 0.1, "min_bytes_per_s": 1e6}, {}) as connect:
        reader, writer = await connect()
        writer.write(GET.replace(b"/ ", b"/held ") + POST % 2**19 + b"a" * 2**18)
        await asyncio.sleep(0.35)
        app.held.set()
        writer.write(b"a" * 2**18)
        assert await answer(reader) == (200, 0)
        assert await answer(reader) == (200, 2**19)


async def test_a_body_far_over_the_limit_is_cut_off() -> None:
    async with serving(Echo(), {}, {"max_request_bytes": 2**20}) as connect:
        reader, writer = await connect()
        writer.write(POST % 2**40)
        for _ in range(6):
            writer.write(b"a" * 2**20)
        status, body = await answer(reader)
        assert status == 413
        assert "4 times limits.max_request_bytes, 1048576" in body["detail"]
        with suppress(ConnectionResetError):  # what it had sent on was never read
            assert await reader.read() == b""


async def test_a_reader_who_does_not_read_is_cut_off() -> None:
    app = Echo()
    async with serving(app, {"body_timeout_s": 0.2}, {}) as connect:
        reader, writer = await connect(limit=1)
        writer.write(GET.replace(b"/ ", b"/large "))
        while not app.num_done:  # what it was being sent has an end: nothing is held any more
            await asyncio.sleep(0.02)
        num_read = 0
        with suppress(ConnectionResetError):
            while part := await reader.read(2**20):
                num_read += len(part)
        assert num_read < len(LARGE)


async def test_a_reader_who_reads_gets_everything() -> None:
    async with serving(Echo(), {"body_timeout_s": 0.2}, {}) as connect:
        reader, writer = await connect()
        writer.write(GET.replace(b"/ ", b"/large "))
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(LARGE)) == LARGE


async def test_beyond_the_most_connections_the_idlest_gives_way() -> None:
    async with serving(Echo(), {}, {"max_connections": 8}) as connect:
        idle = [await connect() for _ in range(8)]
        idle[0][1].write(GET)
        assert await answer(idle[0][0]) == (200, 0)  # the second is now the one that has been idle longest
        reader, writer = await connect()
        writer.write(GET)
        assert await answer(reader) == (200, 0)
        assert await idle[1][0].read() == b""
        idle[0][1].write(GET)
        assert await answer(idle[0][0]) == (200, 0)


async def test_where_no_connection_is_idle_a_newcomer_is_refused_with_the_limit() -> None:
    app = Echo()
    async with serving(app, {}, {"max_connections": 8}) as connect:
        busy = [await connect() for _ in range(8)]
        for _, writer in busy:
            writer.write(GET.replace(b"/ ", b"/held "))
        await asyncio.sleep(0.1)
        reader, _ = await connect()
        status, detail = await refusal(reader)
        assert (status, "limits.max_connections is 8" in detail) == (503, True)
        app.held.set()
        for reader, _ in busy:
            assert await answer(reader) == (200, 0)
