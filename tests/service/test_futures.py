"""On SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.service.parts import ALICE, BOB, accepted, make_futures
from tuft.errors import Gone, InvalidInput, QuotaExceeded, SeqReused, StorageError
from tuft.service.calls import UnloadRun
from tuft.service.futures import Futures, Pending
from tuft.store.db import Database, open_database
from tuft.types import Failure, LossResult, RunCreated

DONE = RunCreated("run")
Life = Callable[..., Futures]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
async def life(database: Database, tmp_path: Path) -> AsyncIterator[Life]:
    """``life()``: a server's futures; the next call is the next server, after the first was killed."""
    lives: list[Futures] = []

    def begin(**options: float) -> Futures:
        if lives:
            lives[-1].writing.close()
        lives.append(make_futures(database, tmp_path, **options))  # type: ignore[arg-type]
        return lives[-1]

    yield begin
    lives[-1].writing.close()


async def test_a_waiter_is_woken_by_the_result(life: Life) -> None:
    futures = life()
    future_id = await accepted(futures, 1)
    waiting = asyncio.create_task(futures.wait(ALICE, future_id, hold_s=30.0))
    await asyncio.sleep(0)
    futures.settle(future_id, DONE)
    assert await waiting == DONE
    assert await futures.wait(ALICE, future_id, 0.0) == DONE, "a result can be read again"


async def test_a_pending_future_says_so_after_the_hold(life: Life) -> None:
    futures = life()
    assert isinstance(await futures.wait(ALICE, await accepted(futures, 1), hold_s=0.01), Pending)


async def test_another_tenants_future_is_as_unknown_as_none(life: Life) -> None:
    futures = life()
    future_id = await accepted(futures, 1)
    futures.settle(future_id, DONE)
    for tenant, wanted in ((BOB, future_id), (ALICE, "future-none")):
        with pytest.raises(Gone, match=wanted):
            await futures.wait(tenant, wanted, 0.0)
    assert await futures.wait(ALICE, future_id, 0.0) == DONE


async def test_a_retry_gets_the_first_calls_future_while_it_is_written_and_ever_after(life: Life) -> None:
    futures = life()
    ids = await asyncio.gather(*(accepted(futures, 1) for _ in range(5)))
    assert len(set(ids)) == 1
    futures.settle(ids[0], DONE)
    assert await accepted(futures, 1) == ids[0]
    await futures.writing.flush()
    later = life()
    assert await accepted(later, 1) == ids[0]
    assert await later.wait(ALICE, ids[0], 0.0) == DONE


async def test_another_request_of_the_same_seq_is_refused_for_good(life: Life) -> None:
    futures = life()
    future_id = await accepted(futures, 1)
    with pytest.raises(SeqReused, match="seq_id: 1 of run was used by another request"):
        await accepted(futures, 1, sent=UnloadRun("other"))
    with pytest.raises(SeqReused):
        await accepted(life(), 1, sent=UnloadRun("other"))
    assert future_id


async def test_what_was_pending_is_pending_in_the_next_server_and_settles_there(life: Life) -> None:
    future_id = await accepted(life(), 7)
    later = life()
    assert later.is_pending(future_id)
    assert await later.request(future_id) == UnloadRun("run")
    waiting = asyncio.create_task(later.wait(ALICE, future_id, hold_s=30.0))
    await asyncio.sleep(0)
    later.settle(future_id, Failure("no", "user"))
    assert await waiting == Failure("no", "user")


async def test_results_leave_memory_when_others_need_the_room_and_are_read_from_the_journal(life: Life) -> None:
    futures = life(cache_bytes=1)
    future_id = await accepted(futures, 1)
    result = LossResult((np.arange(5000, dtype=np.float32),), {"loss:sum": 1.5})
    futures.settle(future_id, result)
    await futures.writing.flush()
    await asyncio.sleep(0)
    assert futures.num_in_memory == 0
    outcome, num_bytes = futures.ended(future_id) or ("", 0)
    assert outcome == "ok"
    assert num_bytes > 20_000
    read = await futures.wait(ALICE, future_id, 0.0)
    assert isinstance(read, LossResult)
    np.testing.assert_array_equal(read.logprobs[0], result.logprobs[0])


async def test_results_are_forgotten_only_after_their_retention(life: Life) -> None:
    futures = life(read_retention_s=0.0, unread_retention_s=60.0)
    read, unread, pending = [await accepted(futures, seq) for seq in range(3)]
    for future_id in (read, unread):
        futures.settle(future_id, DONE)
    await futures.wait(ALICE, read, 0.0)
    await futures.writing.flush()
    assert await futures.sweep() == [read]
    with pytest.raises(Gone):
        await futures.wait(ALICE, read, 0.0)
    assert await futures.wait(ALICE, unread, 0.0) == DONE
    assert futures.is_pending(pending)


async def test_a_tenant_at_its_limit_does_not_hold_up_another(life: Life) -> None:
    futures = life(max_pending=1)
    first = await accepted(futures, 1)
    with pytest.raises(QuotaExceeded, match="max_pending_per_tenant is 1"):
        await accepted(futures, 2)
    await accepted(futures, 1, BOB, run="bobs")
    futures.settle(first, DONE)
    await accepted(futures, 2)


async def test_a_request_that_cannot_be_journaled_never_was(life: Life, tmp_path: Path) -> None:
    futures = life()
    (tmp_path / "journal").write_text("no directory")
    large = UnloadRun("x" * 100_000)
    results = await asyncio.gather(*(accepted(futures, 1, sent=large) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [StorageError] * 3
    assert futures.num_pending == futures.num_in_memory == 0
    (tmp_path / "journal").unlink()
    assert futures.is_pending(await accepted(futures, 1, sent=large))


async def test_every_held_poll_is_answered_when_the_server_goes_down(life: Life) -> None:
    futures = life()
    waiting = asyncio.create_task(futures.wait(ALICE, await accepted(futures, 1), hold_s=600.0))
    await asyncio.sleep(0)
    futures.release_waiters()
    assert isinstance(await waiting, Pending)


async def test_work_is_ended_only_where_that_can_be_and_only_by_its_owner(life: Life) -> None:
    futures, ended = life(), list[str]()
    can, cannot = [await accepted(futures, seq) for seq in range(2)]
    futures.let_cancel(can, lambda: ended.append(can))
    for tenant, future_id, error in ((BOB, can, Gone), (ALICE, "none", Gone), (ALICE, cannot, InvalidInput)):
        with pytest.raises(error, match=future_id):
            futures.cancel(tenant, future_id)
    assert ended == []
    futures.cancel(ALICE, can)
    assert ended == [can]
    for future_id in (can, cannot):
        futures.settle(future_id, DONE)
        futures.cancel(ALICE, future_id)  # too late, and fine
    assert ended == [can]


async def test_the_uptime_never_runs_backwards(life: Life) -> None:
    first = life()
    before_s = first.retention.uptime_s()
    await first.sweep()
    assert life().retention.uptime_s() > before_s
