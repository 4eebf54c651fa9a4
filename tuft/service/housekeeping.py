"""What is done now and then beside the requests: writing what memory kept, forgetting what is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from tuft.errors import StorageError

_INTERVAL_S = 5.0
_PAUSE_S = 0.05

Sweep = Callable[[], Awaitable[None]]

log = structlog.get_logger(__name__)


class Housekeeping:
    """Sweeps in turn, every few seconds. They work in threads, which no cancellation ends: so the one that runs has
    ended when ``stop`` returns, and whoever sweeps a last time does not meet it in the database."""

    def __init__(self, sweeps: Sequence[Sweep]) -> None:
        self._sweeps = sweeps
        self._is_stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        self._is_stopping.set()
        if self._task is not None:
            await self._task

    async def _serve(self) -> None:
        while not await self._stops_within(_INTERVAL_S):
            for sweep in self._sweeps:
                await keep_house(sweep)
                if await self._stops_within(_PAUSE_S):  # the sweep may have kept the database busy
                    return

    async def _stops_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._is_stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True


async def keep_house(sweep: Sweep) -> None:
    """Sweep, whatever comes of it: what the database refuses is tried again in the next round."""
    try:
        await sweep()
    except StorageError as error:
        log.error("housekeeping failed", error=str(error))
    except Exception:  # a bug in one of them must not end the others
        log.exception("housekeeping failed")
