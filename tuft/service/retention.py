"""How long results are kept: a while after they were delivered, and long if nobody fetches them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from tuft.errors import StorageError
from tuft.store.journal import Journal

_MAX_FORGOTTEN_AT_ONCE = 1000
_CLOCK_LAG_S = 10.0
"""More than the time since the uptime was last written, when a server is killed: it must not run backwards."""


class Retention:
    """Counts seconds in which a server of the home runs: no clock that jumps, and no time in which nobody could fetch a
    result."""

    def __init__(self, journal: Journal, read_s: float, unread_s: float) -> None:
        self._journal = journal
        self._read_s = read_s
        self._unread_s = unread_s
        self._delivered: set[str] = set()
        self._epoch_s = 0.0

    def start(self) -> None:
        """Go on where an earlier server ended."""
        self._epoch_s = self._journal.uptime_s() + _CLOCK_LAG_S - time.monotonic()

    def uptime_s(self) -> float:
        """Seconds for which servers of this home have run. Only ever grows."""
        return self._epoch_s + time.monotonic()

    def forget_at_s(self) -> float:
        """When a result that comes now may go, if nobody fetches it."""
        return self.uptime_s() + self._unread_s

    def deliver(self, future_ids: Iterable[str]) -> None:
        """Results that have arrived where they were wanted."""
        self._delivered.update(future_ids)

    async def sweep(self, is_pending: Callable[[str], bool]) -> list[str]:
        """Forget what may go; returns the futures whose results are no longer kept. Raises StorageError."""
        delivered, self._delivered = self._delivered, set()
        delivered = {future_id for future_id in delivered if not is_pending(future_id)}
        try:
            return await asyncio.to_thread(self._sweep, delivered)
        except StorageError:
            self._delivered |= delivered
            raise

    def _sweep(self, delivered: set[str]) -> list[str]:
        uptime_s = self.uptime_s()
        self._journal.keep_time(uptime_s)
        if delivered:
            self._journal.forget_at(delivered, uptime_s + self._read_s)
        forgotten = self._journal.forget_results(uptime_s, _MAX_FORGOTTEN_AT_ONCE)
        self._journal.prune(_MAX_FORGOTTEN_AT_ONCE)
        return forgotten
