"""Which samples of a client have ended. One poll tells of all of them, where each would else have a poll of its own.

What ended is numbered; a *cursor* is the number of the last that a client knows of. Numbers begin at the uptime of all
servers of the home so far, in microseconds, so that a cursor of an earlier server is none of a later one's: such a
client is told everything again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from itertools import takewhile

from tuft.records import SamplingClient
from tuft.service.futures import Futures


class _Log:
    """What has ended of one client's and what it has not acknowledged; ``cursors`` is in ascending order."""

    def __init__(self, newest_cursor: int) -> None:
        self.first = self.last = newest_cursor
        self.cursors: dict[str, int] = {}
        self.grown = asyncio.Event()
        self.num_polls = 0

    def add(self, request_id: str) -> None:
        self.last += 1
        self.cursors[request_id] = self.last
        self.grown.set()

    def acknowledge(self, cursor: int) -> None:
        """The client knows of all up to ``cursor``, if that is of this log."""
        if not self.first <= cursor <= self.last:
            return
        told = list(takewhile(lambda request_id: self.cursors[request_id] <= cursor, self.cursors))
        for request_id in told:
            del self.cursors[request_id]


class Completions:
    """Logs of all sampling clients. They are made anew at start, from what the journal keeps."""

    def __init__(self, futures: Futures) -> None:
        self._futures = futures
        self._logs: dict[SamplingClient, _Log] = {}
        self._client_of: dict[str, SamplingClient] = {}
        self._newest_cursor = 0
        self._is_closing = False

    def expect(self, request_id: str, client: SamplingClient) -> None:
        """``client`` waits for a sample."""
        self._client_of[request_id] = client

    def note_end(self, request_id: str) -> None:
        """An expected sample has ended, well or not; its result can be fetched."""
        self._log(self._client_of[request_id]).add(request_id)

    async def poll(self, client: SamplingClient, cursor: int, hold_s: float) -> tuple[list[str], int]:
        """What has ended since ``cursor``, in order, and the next cursor; held for ``hold_s`` while that is nothing.
        The same ``cursor`` again gets the same again."""
        log = self._log(client)
        log.acknowledge(cursor)
        if not log.cursors and hold_s > 0 and not self._is_closing:
            log.grown.clear()
            log.num_polls += 1
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(log.grown.wait(), hold_s)
            finally:
                log.num_polls -= 1
        return list(log.cursors), log.last

    def free(self, client: SamplingClient, request_ids: Collection[str]) -> None:
        """Results that ``client`` has fetched. Ids of others, or of samples under way, change nothing."""
        fetched = [
            request_id
            for request_id in request_ids
            if self._client_of.get(request_id) == client and not self._futures.is_pending(request_id)
        ]
        self._futures.retention.deliver(fetched)
        self.forget(fetched)

    def forget(self, request_ids: Collection[str]) -> None:
        """Nobody needs to be told of them any more: they were fetched, or are no longer kept."""
        for request_id in request_ids:
            client = self._client_of.pop(request_id, None)
            if client in self._logs:
                self._logs[client].cursors.pop(request_id, None)

    def sweep(self) -> None:
        """Forget the logs of clients that have nothing to be told."""
        self._logs = {client: log for client, log in self._logs.items() if log.cursors or log.num_polls}

    def release_polls(self) -> None:
        """Answer every held poll now: the server is going down."""
        self._is_closing = True
        for log in self._logs.values():
            log.grown.set()

    def _log(self, client: SamplingClient) -> _Log:
        log = self._logs.get(client)
        if log is None:
            self._newest_cursor = max(self._newest_cursor + 1, int(self._futures.retention.uptime_s() * 1e6))
            log = self._logs[client] = _Log(self._newest_cursor)
        return log
