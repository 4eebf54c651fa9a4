"""Requests that clients come back for. Each is journaled before it is acknowledged, and so is its result.

A pending future is in memory; so are results, until they are journaled and others need the room. Whatever is not in
memory is read from the journal: a client that comes back to another process of the server notices nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from secrets import token_hex
from typing import Any, Literal

from tuft.encoding import Encoding
from tuft.errors import Gone, InvalidInput, SeqReused, StorageError, TuftError, refusing
from tuft.metering import Charge, UsageKey
from tuft.records import FutureKey, JournaledFuture, Outcome, Tenant, now
from tuft.service.quotas import Quotas
from tuft.service.retention import Retention
from tuft.service.settlements import Settlement, outcome_of, size_bytes
from tuft.service.waits import Waits
from tuft.service.writing import Writing
from tuft.store.journal import Accepted, Journal, Note, Settled


@dataclass(frozen=True, slots=True)
class Pending:
    """The future is not settled yet; ``reason`` is shown to the user by the SDK. ``position``: 1 is next in line;
    ``eta_s``: seconds until the result, about."""

    state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"
    reason: str | None = None
    position: int | None = None
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be journaled. ``digest`` is that of what its client sent, ``num_rows`` what it needs of a
    pass; ``content`` is ``request`` encoded; ``charge`` is what it may use at most."""

    digest: str
    request: Any
    content: bytes
    num_rows: int = 0
    charge: Charge = field(default_factory=Charge)


@dataclass(slots=True)
class _Entry:
    """``accepted`` ends when the request is journaled, or cannot be; ``cancel`` ends the work, if that can be."""

    future_id: str
    tenant_id: str
    key: FutureKey
    digest: str
    accepted: asyncio.Future[str]
    cancel: Callable[[], object] | None = None
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    result: Settlement | None = None


class Futures:
    """Futures of all tenants. ``cache_bytes``: results kept in memory although they are journaled."""

    def __init__(
        self,
        journal: Journal,
        encoding: Encoding,
        quotas: Quotas,
        retention: Retention,
        *,
        cache_bytes: int = 2**27,
    ) -> None:
        self.writing = Writing(journal)
        self.retention = retention
        self._journal = journal
        self._encoding = encoding
        self._quotas = quotas
        self._cache_bytes = cache_bytes
        self._entries: dict[str, _Entry] = {}
        self._of_key: dict[FutureKey, _Entry] = {}
        self._pending: Counter[str] = Counter()
        self._cached: OrderedDict[str, int] = OrderedDict()  # journaled results in memory, with their bytes
        self._num_cached_bytes = 0
        self._is_closing = False
        self.waits: Waits | None = None
        """Set when the floor is put together: who tells why something waits, and for how long."""

    def start(self) -> list[JournaledFuture]:
        """Take up where an earlier server ended. Returns what is still to be done, in the order it was accepted."""
        self.retention.start()
        self.writing.start()
        pending = self._journal.pending()
        for known in pending:
            self._take_up(known)
        return pending

    @property
    def num_pending(self) -> int:
        return self._pending.total()

    @property
    def num_in_memory(self) -> int:
        """Pending ones, and those whose result is in memory."""
        return len(self._entries)

    # --- from request to result ---------------------------------------------------------------------------------------

    def prepare(self, sent: object, make: Callable[[], tuple[object, int]]) -> Prepared:
        """``make`` returns the request to be journaled, which may be what was ``sent``, and its rows. This takes time
        for much data and may run in a thread."""
        content = self._encoding.encode(sent)
        digest = hashlib.sha256(content).hexdigest()
        request, num_rows = make()
        return Prepared(digest, request, content if request is sent else self._encoding.encode(request), num_rows)

    async def accept(self, tenant: Tenant, key: FutureKey, name: str, prepared: Prepared) -> tuple[str, bool]:
        """The id of the request's future, once it is journaled, and whether it is new. A retry gets the first call's.

        Raises SeqReused if another request had the same key, QuotaExceeded or CapReached from ``Quotas.reserve``,
        StorageError if the journal cannot take it: then nothing has happened, and a retry may do.
        """
        known = self._of_key.get(key)
        if known is not None:
            _require_same(key, known.digest, prepared.digest)
            return await asyncio.shield(known.accepted), False
        journaled = self._journal.find(key)
        if journaled is not None:
            _require_same(key, journaled.digest, prepared.digest)
            return journaled.future_id, False
        entry = self._enter(tenant, key, prepared)
        future = JournaledFuture(
            future_id=entry.future_id,
            tenant_id=tenant.tenant_id,
            key_number=tenant.key_number,
            key=key,
            name=name,
            digest=prepared.digest,
            num_rows=prepared.num_rows,
            request_bytes=len(prepared.content),
            accepted_at=now(),
            charge=prepared.charge,
        )
        try:
            await self.writing.write(lambda: Accepted(future, prepared.content))
        except BaseException as error:  # whatever it was: it goes on, and nothing was accepted
            self._forget(entry.future_id)
            self._pending[tenant.tenant_id] -= 1
            self._quotas.release(entry.future_id)
            entry.accepted.set_exception(error if isinstance(error, TuftError) else StorageError("not accepted"))
            entry.accepted.exception()  # perhaps nobody waits for it
            raise
        entry.accepted.set_result(entry.future_id)
        return entry.future_id, True

    async def request(self, future_id: str) -> Any:
        """What was asked, from the journal. Raises StorageError."""
        return await asyncio.to_thread(self._read, future_id, "request")

    def settle(self, future_id: str, result: Settlement, usage: Mapping[UsageKey, int] | None = None) -> None:
        """Give the future its result and wake who waits for it; ``usage`` is counted with it. A future settles once."""
        entry = self._entries[future_id]
        assert entry.result is None, f"{future_id} settles twice"
        entry.result = result
        self._pending[entry.tenant_id] -= 1
        self._quotas.settle(future_id, usage or {})
        if self.waits is not None:
            self.waits.settled(entry.key)
        _wake(entry)
        forget_at_s = self.retention.forget_at_s()
        num_bytes = 0

        def make() -> Note:
            nonlocal num_bytes
            content = self._encoding.encode(result)
            num_bytes = len(content)
            return Settled(future_id, outcome_of(result), content, forget_at_s, usage or {})

        def journaled(error: StorageError | None) -> None:
            if error is None and future_id in self._entries:  # one that the journal refuses for good stays in memory
                self._cache(future_id, num_bytes)

        self.writing.submit(make, journaled)

    # --- the client's side --------------------------------------------------------------------------------------------

    async def wait(self, tenant: Tenant, future_id: str, hold_s: float) -> Settlement | Pending:
        """The result, or Pending after ``hold_s`` seconds. Raises Gone for an id that is unknown, another tenant's,
        or no longer kept."""
        entry = self._own(tenant, future_id)
        if entry is None:
            return await self._kept(tenant, future_id)
        if entry.result is None and not self._is_closing:
            waiter = asyncio.get_running_loop().create_future()
            entry.waiters.append(waiter)
            try:
                await asyncio.wait([waiter], timeout=hold_s)
            finally:
                entry.waiters.remove(waiter)
        if entry.result is None and self.waits is not None and not self._is_closing:
            await self.waits.look()
        if entry.result is None:
            return self._explained(entry.key)
        self.retention.deliver([future_id])
        return entry.result

    def let_cancel(self, future_id: str, cancel: Callable[[], object]) -> None:
        """From now on ``cancel`` ends the work of a pending future, which then settles soon."""
        self._entries[future_id].cancel = cancel

    def cancel(self, tenant: Tenant, future_id: str) -> None:
        """End a future's work; one that is settled stays as it is. Raises Gone like ``wait``, InvalidInput for work
        that cannot be ended."""
        entry = self._own(tenant, future_id)
        if entry is None:
            self._owned(tenant, future_id)
            return
        if entry.result is not None:
            return
        if entry.cancel is None:
            raise InvalidInput(
                "request_id", future_id, "only samples can be cancelled: what a run does keeps its order"
            )
        entry.cancel()

    def ended(self, future_id: str) -> tuple[Outcome, int] | None:
        """How it ended, and about how many bytes its result has. None while it is pending, or once that is not kept."""
        entry = self._entries.get(future_id)
        if entry is not None:
            return None if entry.result is None else (outcome_of(entry.result), size_bytes(entry.result))
        known = self._journal.future(future_id)
        if known is None or known.outcome is None or known.result_bytes is None:
            return None
        return known.outcome, known.result_bytes

    async def waiting(self, tenant: Tenant, limit: int) -> list[tuple[str, FutureKey, Pending]]:
        """The tenant's first pending futures, in the order in which they were accepted, and why each waits."""
        if self.waits is not None:
            await self.waits.look()
        pending = (entry for entry in self._entries.values() if entry.result is None and tenant.owns(entry))
        return [(entry.future_id, entry.key, self._explained(entry.key)) for entry in islice(pending, limit)]

    def num_waiting(self, tenant: Tenant) -> int:
        return self._pending[tenant.tenant_id]

    def is_pending(self, future_id: str) -> bool:
        entry = self._entries.get(future_id)
        return entry is not None and entry.result is None

    # --- housekeeping -------------------------------------------------------------------------------------------------

    async def sweep(self) -> list[str]:
        """Forget what need not be kept; returns the futures whose results are gone. Raises StorageError."""
        forgotten = await self.retention.sweep(self.is_pending)
        for future_id in forgotten:
            self._forget(future_id)
        return forgotten

    def release_waiters(self) -> None:
        """Answer every held poll now: the server is going down."""
        self._is_closing = True
        for entry in self._entries.values():
            _wake(entry)

    def _explained(self, key: FutureKey) -> Pending:
        wait = None if self.waits is None else self.waits.explain(key)
        return Pending() if wait is None else Pending(wait.state, wait.reason, wait.position, wait.eta_s)

    def _enter(self, tenant: Tenant, key: FutureKey, prepared: Prepared) -> _Entry:
        future_id = f"future-{token_hex(16)}"
        self._quotas.reserve(future_id, tenant, prepared.charge)
        accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        entry = _Entry(future_id, tenant.tenant_id, key, prepared.digest, accepted)
        self._keep(entry)
        return entry

    def _take_up(self, known: JournaledFuture) -> None:
        accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        accepted.set_result(known.future_id)
        self._quotas.take_up(known.future_id, known.tenant_id, known.key_number, known.charge)
        self._keep(_Entry(known.future_id, known.tenant_id, known.key, known.digest, accepted))

    def _keep(self, entry: _Entry) -> None:
        self._entries[entry.future_id] = self._of_key[entry.key] = entry
        self._pending[entry.tenant_id] += 1

    def _cache(self, future_id: str, num_bytes: int) -> None:
        """The result may leave memory now, and those used longest ago do if it is too much."""
        self._cached[future_id] = num_bytes
        self._num_cached_bytes += num_bytes
        while self._num_cached_bytes > self._cache_bytes:
            self._forget(next(iter(self._cached)))

    def _forget(self, future_id: str) -> None:
        entry = self._entries.pop(future_id, None)
        if entry is not None:
            self._of_key.pop(entry.key, None)
        self._num_cached_bytes -= self._cached.pop(future_id, 0)

    async def _kept(self, tenant: Tenant, future_id: str) -> Settlement:
        if self._owned(tenant, future_id).result_bytes is None:
            raise _gone(future_id)
        result: Settlement = await asyncio.to_thread(self._read, future_id, "result")
        self.retention.deliver([future_id])
        return result

    def _owned(self, tenant: Tenant, future_id: str) -> JournaledFuture:
        known = self._journal.future(future_id)
        if known is None or not tenant.owns(known):
            raise _gone(future_id)
        return known

    def _own(self, tenant: Tenant, future_id: str) -> _Entry | None:
        """In memory. Another tenant's is not: it is looked for in the journal, like one that does not exist."""
        entry = self._entries.get(future_id)
        return entry if entry is not None and tenant.owns(entry) else None

    def _read(self, future_id: str, content: Literal["request", "result"]) -> Any:
        return self._encoding.decode(self._journal.content(future_id, content))


def _gone(future_id: str) -> Gone:
    error = Gone(f"request_id: {future_id!r} is unknown here, or its result is no longer kept")
    return refusing("future", future_id, error)


def _require_same(key: FutureKey, known: str, digest: str) -> None:
    if known != digest:
        raise SeqReused(
            f"seq_id: {key.seq} of {key.subject_id} was used by another request; a retry must repeat the first one"
        )


def _wake(entry: _Entry) -> None:
    for waiter in entry.waiters:
        if not waiter.done():
            waiter.set_result(None)
