"""Work in small portions, so that what is urgent finds the event loop free.

The loop does all that is ready before it looks at its sockets again. When a thousand requests come at once, or a
thousand results, that is a second, and a health check needs several such rounds. What waits here is not ready yet.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """``per_round`` pieces of work in each round of the event loop, first come first served."""

    def __init__(self, per_round: int) -> None:
        self._per_round = per_round
        self._left = per_round
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_armed = False

    def take(self, work: Callable[[], object]) -> None:
        """Do it now, or in one of the next rounds."""
        if self._left and not self._waiting:
            self._left -= 1
            self._arm()
            work()
        else:
            self._waiting.append(work)
            self._arm()

    async def turn(self) -> None:
        """Wait for one's turn."""
        come: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def call() -> None:
            if not come.done():
                come.set_result(None)

        self.take(call)
        if not come.done():
            await come

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            asyncio.get_running_loop().call_soon(self._next_round)

    def _next_round(self) -> None:
        self._is_armed = False
        self._left = self._per_round
        while self._left and self._waiting:
            self._left -= 1
            self._waiting.popleft()()
        if self._left < self._per_round:
            self._arm()
