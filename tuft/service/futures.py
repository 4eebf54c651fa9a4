"""Results that clients come back for. Held in memory: each is kept until it was read, and a while longer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Literal

import structlog

from tuft.errors import Gone, InvalidInput, QuotaExceeded, ServerError, TuftError
from tuft.records import Tenant
from tuft.types import Failure, FutureResult

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pending:
    """The future is not settled yet; ``reason`` is shown to the user by the SDK."""

    state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"
    reason: str | None = None


@dataclass(slots=True)
class _Entry:
    """``cancel`` ends the work, if that can be."""

    tenant_id: str
    cancel: Callable[[], object] | None = None
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    result: FutureResult | Failure | None = None
    forget_at_s: float | None = None


class Futures:
    """Futures of all tenants. Times in seconds of the monotonic clock."""

    def __init__(self, *, read_retention_s: float, unread_retention_s: float, max_pending_per_tenant: int) -> None:
        self._read_retention_s = read_retention_s
        self._unread_retention_s = unread_retention_s
        self._max_pending_per_tenant = max_pending_per_tenant
        self._entries: dict[str, _Entry] = {}
        self._pending: Counter[str] = Counter()
        self._is_closing = False

    @property
    def num_pending(self) -> int:
        return self._pending.total()

    @property
    def num_kept(self) -> int:
        """Pending ones, and those whose result is kept."""
        return len(self._entries)

    def create(self, tenant_id: str) -> str:
        """A new pending future's id. Raises QuotaExceeded when the tenant has too many pending."""
        if self._pending[tenant_id] >= self._max_pending_per_tenant:
            raise QuotaExceeded(
                f"{self._pending[tenant_id]} operations of yours are waiting; "
                f"limits.max_pending_per_tenant is {self._max_pending_per_tenant}: read some results first"
            )
        future_id = f"future-{token_hex(16)}"
        self._entries[future_id] = _Entry(tenant_id)
        self._pending[tenant_id] += 1
        return future_id

    def settle(self, future_id: str, result: FutureResult | Failure) -> None:
        """Give the future its result and wake who waits for it. A future settles once."""
        entry = self._entries[future_id]
        assert entry.result is None, f"{future_id} settles twice"
        entry.result = result
        entry.forget_at_s = time.monotonic() + self._unread_retention_s
        self._pending[entry.tenant_id] -= 1
        _wake(entry)

    async def wait(self, tenant: Tenant, future_id: str, hold_s: float) -> FutureResult | Failure | Pending:
        """The result, or Pending after ``hold_s`` seconds. Raises Gone for an id that is unknown, another tenant's,
        or no longer kept."""
        entry = self._owned(tenant, future_id)
        if entry.result is None and not self._is_closing:
            waiter = asyncio.get_running_loop().create_future()
            entry.waiters.append(waiter)
            try:
                await asyncio.wait([waiter], timeout=hold_s)
            finally:
                entry.waiters.remove(waiter)
        if entry.result is None:
            return Pending()
        entry.forget_at_s = time.monotonic() + self._read_retention_s
        return entry.result

    def let_cancel(self, future_id: str, cancel: Callable[[], object]) -> None:
        """From now on ``cancel`` ends the work of a pending future, which then settles soon."""
        self._entries[future_id].cancel = cancel

    def cancel(self, tenant: Tenant, future_id: str) -> None:
        """End a future's work; one that is settled stays as it is. Raises Gone like ``wait``, InvalidInput for work
        that cannot be ended."""
        entry = self._owned(tenant, future_id)
        if entry.result is not None:
            return
        if entry.cancel is None:
            raise InvalidInput(
                "request_id", future_id, "only samples can be cancelled: what a run does keeps its order"
            )
        entry.cancel()

    def peek(self, future_id: str) -> FutureResult | Failure | None:
        """The result if there is one. That it was seen does not shorten how long it is kept."""
        entry = self._entries.get(future_id)
        return None if entry is None else entry.result

    def free(self, future_id: str) -> bool:
        """Forget a result that has arrived where it was wanted; False if there is none."""
        if self.peek(future_id) is None:
            return False
        del self._entries[future_id]
        return True

    def known(self, future_id: str) -> bool:
        return future_id in self._entries

    def sweep(self) -> None:
        """Forget results that were read, or that nobody reads, long enough ago."""
        now_s = time.monotonic()
        expired = [
            future_id
            for future_id, entry in self._entries.items()
            if entry.forget_at_s is not None and entry.forget_at_s <= now_s
        ]
        for future_id in expired:
            del self._entries[future_id]

    def release_waiters(self) -> None:
        """Answer every held poll now: the server is going down."""
        self._is_closing = True
        for entry in self._entries.values():
            _wake(entry)

    def _owned(self, tenant: Tenant, future_id: str) -> _Entry:
        entry = self._entries.get(future_id)
        if entry is None or entry.tenant_id != tenant.tenant_id:
            raise Gone(f"request_id: {future_id!r} is unknown here, or its result is no longer kept")
        return entry


def _wake(entry: _Entry) -> None:
    for waiter in entry.waiters:
        if not waiter.done():
            waiter.set_result(None)


async def outcome(work: Awaitable[FutureResult]) -> FutureResult | Failure:
    """What ``work`` ends with; its errors become a Failure, so that a future always settles."""
    try:
        return await work
    except TuftError as error:
        return failure(error)
    except Exception as error:  # the boundary: a bug fails this one operation, never the loop
        log.exception("internal error")
        return failure(ServerError(f"internal error: {type(error).__name__}: {error}"))


def failure(error: TuftError) -> Failure:
    return Failure(str(error), "user" if error.category == "user" else "server")
