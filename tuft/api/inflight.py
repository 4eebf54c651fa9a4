"""Bytes that requests hold while they are received and decoded, and large answers while they are sent: bounded
together, so that many large ones at once wait for each other and not for memory."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Response
from starlette.types import Receive, Scope, Send

from tuft.errors import Overloaded

_UNCOUNTED_BYTES = 2**16
"""As much as a connection may have in its buffers anyway."""
_PATIENCE_S = 10.0
_SENT_AT_ONCE = 2**20


@dataclass(slots=True)
class _Waiting:
    tenant_id: str
    num_bytes: int
    granted: asyncio.Future[None]


class InFlight:
    """What all requests hold together, at most ``max_bytes``, of which one tenant has at most half while it has
    anything. Lives on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._waiting: deque[_Waiting] = deque()

    @property
    def num_bytes(self) -> int:
        return self._held.total()

    async def take(self, tenant_id: str, num_bytes: int) -> Hold:
        """Wait for so many bytes; for all there are, if they are more. Raises Overloaded if they are not to be had
        within some seconds."""
        if num_bytes <= _UNCOUNTED_BYTES:
            return Hold(self, tenant_id, 0)
        waiting = _Waiting(tenant_id, min(num_bytes, self._max_bytes), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await waiting.granted
        except TimeoutError:
            raise Overloaded(
                f"requests hold {self.num_bytes} bytes at this moment, and yours needs {waiting.num_bytes}; "
                f"limits.max_inflight_bytes is {self._max_bytes}"
            ) from None
        except asyncio.CancelledError:
            if waiting.granted.done() and not waiting.granted.cancelled():
                self.give(tenant_id, waiting.num_bytes)
            raise
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        return Hold(self, tenant_id, waiting.num_bytes)

    def give(self, tenant_id: str, num_bytes: int) -> None:
        self._held[tenant_id] -= num_bytes
        if not self._held[tenant_id]:
            del self._held[tenant_id]
        self._grant()

    def _grant(self) -> None:
        """To whoever came first; one who has too much already is passed over."""
        for waiting in list(self._waiting):
            if self.num_bytes + waiting.num_bytes > self._max_bytes:
                return
            held = self._held[waiting.tenant_id]
            if waiting.granted.done() or (held and held + waiting.num_bytes > self._max_bytes // 2):
                continue
            self._held[waiting.tenant_id] += waiting.num_bytes
            self._waiting.remove(waiting)
            waiting.granted.set_result(None)


class Hold:
    """Bytes that a request holds until ``release``."""

    def __init__(self, inflight: InFlight, tenant_id: str, num_bytes: int) -> None:
        self._inflight = inflight
        self._tenant_id = tenant_id
        self._num_bytes = num_bytes

    async def change(self, num_bytes: int) -> None:
        """Hold so many instead. What is held goes first: two who waited with it for each other would wait in vain."""
        self.release()
        self._num_bytes = (await self._inflight.take(self._tenant_id, num_bytes))._num_bytes

    def release(self) -> None:
        if self._num_bytes:
            self._inflight.give(self._tenant_id, self._num_bytes)
            self._num_bytes = 0


class HeldResponse(Response):
    """A large answer, sent as fast as its reader takes it; what it holds is released when the last of it is gone."""

    def __init__(self, content: bytes, hold: Hold, media_type: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # as ASGI has it
        body = memoryview(self.body)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(body), _SENT_AT_ONCE):
                await send(
                    {"type": "http.response.body", "body": body[start : start + _SENT_AT_ONCE], "more_body": True}
                )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._hold.release()


async def inflight_of(request: Request) -> InFlight:
    inflight: InFlight = request.app.state.inflight
    return inflight


Bounded = Annotated[InFlight, Depends(inflight_of)]
