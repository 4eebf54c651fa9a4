"""The engine's replies, as the event loop gets them: in the order in which they came, a few at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from tuft.engine.base import Command, Engine
from tuft.turns import Turns

_PER_ROUND = 16
"""A pass may answer hundreds of small operations at once; health checks are answered in between."""

Told = Callable[[Future[Any]], object]


class Replies:
    """One order for all: whoever has a reply knows that those to earlier commands have been dealt with."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turns = Turns(_PER_ROUND)

    def send(self, batch: Sequence[tuple[Command, Told]]) -> None:
        """Submit the commands as one batch; each is told of its reply."""
        loop = asyncio.get_running_loop()
        replies = self._engine.submit([command for command, _ in batch])
        for (_, told), reply in zip(batch, replies, strict=True):
            reply.add_done_callback(partial(self._on_loop, loop, told))

    async def ask(self, command: Command) -> Any:
        """The reply to one command, after everything submitted before it. Raises what it ended with."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def told(reply: Future[Any]) -> None:
            if answered.done():  # whoever asked was cancelled
                return
            error = reply.exception()
            if error is None:
                answered.set_result(reply.result())
            else:
                answered.set_exception(error)

        self.send([(command, told)])
        return await answered

    def _on_loop(self, loop: asyncio.AbstractEventLoop, told: Told, reply: Future[Any]) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody waits any more
            loop.call_soon_threadsafe(self._turns.take, partial(told, reply))
