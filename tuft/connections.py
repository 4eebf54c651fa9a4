"""Clients' connections: how many there are, how large a request's head is, how long a sender or a reader may take.

uvicorn waits for a head, for the rest of a body and for a reader of an answer without end; a few hundred sockets that
drip bytes would hold the server. Here each of these ends by a rule of the configuration, and with an answer that names
it where one can still be given.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tuft.config import Config
from tuft.turns import Turns

_WAITING_CONNECTIONS = 4096
"""How many the kernel keeps for us: clients who all come back at once are not refused."""
_OTHER_FILES = 128
"""Descriptors for all that is no connection: a server that has none left can accept nobody."""
_ACCEPTED_AT_ONCE = 16
"""Of them, before others are served: asyncio would take all that wait in one go, and answer nobody meanwhile."""
_STARTED_AT_ONCE = 3
"""Requests, in one round of the event loop."""
_PROBES = ("/api/v1/healthz", "/readyz")
_DROPPED_BODIES = 4
"""A body over its limit is read to its end and dropped, since a sender who is cut off never sees the answer; one of
more than so many times the largest body is cut off."""


class Rules:
    """What the configuration allows, and which connections are idle, longest first."""

    def __init__(self, config: Config) -> None:
        self.server = config.server
        self.limits = config.limits
        self.idle: dict[Connection, None] = {}
        self.turns = Turns(_STARTED_AT_ONCE)
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max(min(self.limits.max_connections, open_files - _OTHER_FILES), 8)

    @property
    def window_bytes(self) -> float:
        """What a sender must bring, and a reader take, in each ``server.body_timeout_s``."""
        return self.server.min_bytes_per_s * self.server.body_timeout_s

    def make_room(self) -> bool:
        """Close the connection that has been idle longest; False if none is."""
        idlest = next(iter(self.idle), None)
        if idlest is None:
            return False
        del self.idle[idlest]
        idlest.transport.close()
        return True


class Connection(HttpToolsProtocol):
    """uvicorn's connection, within ``rules``."""

    rules: ClassVar[Rules]
    _in_head = True
    _head_bytes = 0
    _fed_bytes = 0
    _in_body = False
    _body_bytes = 0
    _window_bytes = 0
    _was_paused = False
    _unsent_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    # --- its life -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # told of every byte that is not sent at once
        most = self.rules.max_connections
        if len(self.connections) > most and not self.rules.make_room():
            allowed = f"limits.max_connections is {self.rules.limits.max_connections}"
            self._refuse(503, f"{most} connections are open and in use; {allowed}")
            return
        self.rules.idle[self] = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.rules.idle.pop(self, None)
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._fed_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        if self._in_body:
            self._window_bytes += len(data)
            self._body_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        most = self.rules.limits.max_header_bytes
        if self._in_head and self._head_bytes > most:
            self._refuse(431, _large_head(most))
        elif self._in_body:
            self._was_paused = self._was_paused or self.flow.read_paused
            if self._body_timer is None:
                self._await_body()
            most = self.rules.limits.max_request_bytes
            if self._body_bytes > _DROPPED_BODIES * most:
                self._refuse(413, f"body: it has more than {_DROPPED_BODIES} times limits.max_request_bytes, {most}")

    # --- the parser's callbacks ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._in_head, self._head_bytes = True, self._fed_bytes
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes behind a body is nothing that we read
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._body_bytes = self._window_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self.rules.idle.pop(self, None)
        most, app = self.rules.limits.max_header_bytes, self.app
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > most:
            self.app = _Refusal(431, _large_head(most))
        super().on_headers_complete()
        self.app = app

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            self.rules.idle[self] = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """A few at once, but for who asks how we are."""
        if cycle.scope["path"] in _PROBES:
            super()._start_asgi_task(cycle, app)
        else:
            self.rules.turns.take(lambda: self._start_if_there(cycle, app))

    def _start_if_there(self, cycle: RequestResponseCycle, app: Any) -> None:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)

    # --- a head, a body, a reader in time -----------------------------------------------------------------------------

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.rules.server.header_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        limit_s = self.rules.server.header_timeout_s
        self._refuse(408, f"no complete head came within server.header_timeout_s, {limit_s:g} s")

    def _await_body(self) -> None:
        self._window_bytes, self._was_paused = 0, self.flow.read_paused
        self._body_timer = self.loop.call_later(self.rules.server.body_timeout_s, self._check_body)

    def _check_body(self) -> None:
        """A sender whom we kept waiting is not late."""
        server = self.rules.server
        if self._was_paused or self.flow.read_paused or self._window_bytes >= self.rules.window_bytes:
            self._await_body()
            return
        self._refuse(
            408,
            f"body: {self._window_bytes} bytes came in server.body_timeout_s, {server.body_timeout_s:g} s; "
            f"server.min_bytes_per_s is {server.min_bytes_per_s:g}",
        )

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_reader(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.rules.server.body_timeout_s, self._check_reader)

    def _check_reader(self) -> None:
        if self._unsent_bytes - self.transport.get_write_buffer_size() < self.rules.window_bytes:
            reset = struct.pack("ii", 1, 0)  # else the kernel keeps what it could not send, for minutes
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            self.transport.abort()
        else:
            self._await_reader()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer and close; where an answer is under way or owed to an earlier request, close alone."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or (self._in_body and not cycle.response_started):
            body = _refusal_body(detail)
            lines = [
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                *(f"{n}: {v}" for n, v in _headers(body)),
                "",
                "",
            ]
            self.transport.write("\r\n".join(lines).encode() + body)
            self.transport.close()
        else:
            self.transport.abort()


class _Refusal:
    """An application that answers every request alike and closes the connection."""

    def __init__(self, status: int, detail: str) -> None:
        self._status = status
        self._body = _refusal_body(detail)

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        headers = [(name.encode(), value.encode()) for name, value in _headers(self._body)]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


def _large_head(limit_bytes: int) -> str:
    return f"head: it has more than {limit_bytes} bytes, which is limits.max_header_bytes"


def _refusal_body(detail: str) -> bytes:
    return json.dumps({"detail": detail}).encode()


def _headers(body: bytes) -> list[tuple[str, str]]:
    return [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("retry-after", "1"),
        ("connection", "close"),
    ]


class HttpServer(uvicorn.Server):
    """Serves ``app`` on the sockets that ``serve`` is given, within the rules of ``config``. Leaves signals to us:
    queued work ends before the listener does."""

    def __init__(self, app: Any, config: Config) -> None:
        protocol = type("ConfiguredConnection", (Connection,), {"rules": Rules(config)})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=config.server.keep_alive_s,  # type: ignore[arg-type]  # any number of seconds does
                lifespan="off",
                backlog=_ACCEPTED_AT_ONCE,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_WAITING_CONNECTIONS)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
