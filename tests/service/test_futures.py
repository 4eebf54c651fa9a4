from __future__ import annotations

import asyncio

import pytest

from tuft.errors import Gone, InvalidInput, QuotaExceeded
from tuft.records import Tenant
from tuft.service.futures import Futures, Pending
from tuft.service.settlements import outcome
from tuft.types import Failure, FutureResult, RunCreated

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")


def futures(read_retention_s: float = 60.0, unread_retention_s: float = 60.0, max_pending: int = 10) -> Futures:
    return Futures(
        read_retention_s=read_retention_s, unread_retention_s=unread_retention_s, max_pending_per_tenant=max_pending
    )


async def test_a_waiter_is_woken_by_the_result() -> None:
    registry = futures()
    future_id = registry.create(ALICE.tenant_id)
    waiting = asyncio.create_task(registry.wait(ALICE, future_id, hold_s=30.0))
    await asyncio.sleep(0)
    registry.settle(future_id, RunCreated("run"))
    assert await waiting == RunCreated("run")


async def test_a_result_can_be_read_again() -> None:
    registry = futures()
    future_id = registry.create(ALICE.tenant_id)
    registry.settle(future_id, RunCreated("run"))
    assert await registry.wait(ALICE, future_id, 0.0) == await registry.wait(ALICE, future_id, 0.0)


async def test_a_pending_future_says_so_after_the_hold() -> None:
    registry = futures()
    assert await registry.wait(ALICE, registry.create(ALICE.tenant_id), hold_s=0.01) == Pending()


async def test_another_tenants_future_is_as_unknown_as_none() -> None:
    registry = futures()
    future_id = registry.create(ALICE.tenant_id)
    registry.settle(future_id, RunCreated("run"))
    with pytest.raises(Gone, match=future_id):
        await registry.wait(BOB, future_id, 0.0)
    assert await registry.wait(ALICE, future_id, 0.0) == RunCreated("run")


async def test_results_are_forgotten_only_after_their_retention() -> None:
    registry = futures(read_retention_s=0.0, unread_retention_s=60.0)
    read, unread, pending = (registry.create(ALICE.tenant_id) for _ in range(3))
    registry.settle(read, RunCreated("read"))
    registry.settle(unread, RunCreated("unread"))
    await registry.wait(ALICE, read, 0.0)
    registry.sweep()
    assert (registry.known(read), registry.known(unread), registry.known(pending)) == (False, True, True)


async def test_a_tenant_at_its_limit_does_not_hold_up_another() -> None:
    registry = futures(max_pending=1)
    first = registry.create(ALICE.tenant_id)
    with pytest.raises(QuotaExceeded, match="max_pending_per_tenant is 1"):
        registry.create(ALICE.tenant_id)
    registry.create(BOB.tenant_id)
    registry.settle(first, RunCreated("run"))
    registry.create(ALICE.tenant_id)


async def test_every_held_poll_is_answered_when_the_server_goes_down() -> None:
    registry = futures()
    waiting = asyncio.create_task(registry.wait(ALICE, registry.create(ALICE.tenant_id), hold_s=600.0))
    await asyncio.sleep(0)
    registry.release_waiters()
    assert await waiting == Pending()


async def test_work_is_ended_only_where_that_can_be_and_only_by_its_owner() -> None:
    registry, ended = futures(), []
    can, cannot = registry.create(ALICE.tenant_id), registry.create(ALICE.tenant_id)
    registry.let_cancel(can, lambda: ended.append(can))
    for tenant, future_id, error in ((BOB, can, Gone), (ALICE, "none", Gone), (ALICE, cannot, InvalidInput)):
        with pytest.raises(error, match=future_id):
            registry.cancel(tenant, future_id)
    assert ended == []
    registry.cancel(ALICE, can)
    assert ended == [can]
    for future_id in (can, cannot):
        registry.settle(future_id, RunCreated("run"))
        registry.cancel(ALICE, future_id)  # too late, and fine
    assert ended == [can]


async def test_a_result_that_has_arrived_is_freed_at_once() -> None:
    registry = futures()
    future_id = registry.create(ALICE.tenant_id)
    assert not registry.free(future_id)
    registry.settle(future_id, RunCreated("run"))
    assert registry.peek(future_id) == RunCreated("run")
    assert registry.free(future_id)
    assert registry.peek(future_id) is None
    assert registry.num_kept == 0
    with pytest.raises(Gone):
        await registry.wait(ALICE, future_id, 0.0)


async def test_errors_become_failures_of_their_category() -> None:
    async def user_error() -> FutureResult:
        raise InvalidInput("rank", 0, "must be 1 to 8")

    async def bug() -> FutureResult:
        raise ZeroDivisionError("oops")

    assert await outcome(user_error()) == Failure("rank: got 0; must be 1 to 8", "user")
    failed = await outcome(bug())
    assert isinstance(failed, Failure)
    assert failed.category == "server"
    assert "oops" in failed.message
