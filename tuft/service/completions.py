"""Which samples of a client have ended. One poll tells of all of them, where each would else have a poll of its own.

What ended is numbered; a *cursor* is the number of the last that a client knows of. Numbers begin at the present time
in microseconds, so that a cursor of an earlier server is none of a later one's: such a client is told everything again.
A client that is told of a sample whose result is not kept learns that when it fetches it, and asks for it anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from itertools import takewhile

from tuft.records import SamplingClient
from tuft.service.futures import Futures
from tuft.store.awaited import AwaitedSamples


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

    def acknowledge(self, cursor: int) -> list[str]:
        """The client knows of all up to ``cursor``, if that is of this log."""
        if not self.first <= cursor <= self.last:
            return []
        told = list(takewhile(lambda request_id: self.cursors[request_id] <= cursor, self.cursors))
        for request_id in told:
            del self.cursors[request_id]
        return told


class Completions:
    """Logs of all sampling clients. What clients have not been told of is kept in the database, too: after a restart
    they are told of it, or would wait for ever. ``lost_retention_s``: how long then."""

    def __init__(self, futures: Futures, awaited: AwaitedSamples, lost_retention_s: float) -> None:
        self._futures = futures
        self._awaited = awaited
        self._lost_retention_s = lost_retention_s
        self._logs: dict[SamplingClient, _Log] = {}
        self._client_of: dict[str, SamplingClient] = {}
        self._told: set[str] = set()
        self._lost: frozenset[str] = frozenset()
        self._forget_lost_at_s = 0.0
        self._newest_cursor = 0
        self._is_closing = False

    def start(self) -> int:
        """What an earlier server had accepted has ended with it. Returns how many samples those are."""
        lost = self._awaited.all()
        self._lost, self._forget_lost_at_s = frozenset(lost), time.monotonic() + self._lost_retention_s
        self._client_of.update(lost)
        for request_id in lost:
            self.note_end(request_id)
        return len(lost)

    def expect(self, request_id: str, client: SamplingClient) -> None:
        """``client`` waits for a sample."""
        self._client_of[request_id] = client
        self._awaited.add(request_id, client)

    def note_end(self, request_id: str) -> None:
        """An expected sample has ended, well or not; its result can be fetched."""
        self._log(self._client_of[request_id]).add(request_id)

    async def poll(self, client: SamplingClient, cursor: int, hold_s: float) -> tuple[list[str], int]:
        """What has ended since ``cursor``, in order, and the next cursor; held for ``hold_s`` while that is nothing.
        The same ``cursor`` again gets the same again."""
        log = self._log(client)
        self._told.update(log.acknowledge(cursor))
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
        for request_id in request_ids:
            if self._client_of.get(request_id) == client and self._futures.free(request_id):
                self._forget(request_id)

    def sweep(self) -> None:
        """Forget what is no longer kept."""
        if self._lost and time.monotonic() >= self._forget_lost_at_s:
            self._lost = frozenset()
        kept = self._futures.known
        for request_id in [id_ for id_ in self._client_of if id_ not in self._lost and not kept(id_)]:
            self._forget(request_id)
        told, self._told = self._told, set()
        self._awaited.remove(told)
        self._logs = {client: log for client, log in self._logs.items() if log.cursors or log.num_polls}

    def release_polls(self) -> None:
        """Answer every held poll now: the server is going down."""
        self._is_closing = True
        for log in self._logs.values():
            log.grown.set()

    def _forget(self, request_id: str) -> None:
        client = self._client_of.pop(request_id)
        self._told.add(request_id)
        if client in self._logs:
            self._logs[client].cursors.pop(request_id, None)

    def _log(self, client: SamplingClient) -> _Log:
        log = self._logs.get(client)
        if log is None:
            self._newest_cursor = max(self._newest_cursor + 1, time.time_ns() // 1000)
            log = self._logs[client] = _Log(self._newest_cursor)
        return log
