from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tuft.records import SamplingClient
from tuft.service.completions import Completions
from tuft.service.futures import Futures
from tuft.store.awaited import AwaitedSamples
from tuft.store.db import Database, open_database
from tuft.types import Failure

FIRST, CLONE, OTHER = SamplingClient("s:sample:0"), SamplingClient("s:sample:0", 7), SamplingClient("s:sample:1")
DONE = Failure("any result will do", "user")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    yield opened
    opened.close()


class Rig:
    """One life of a server."""

    def __init__(self, database: Database, retention_s: float = 60.0) -> None:
        self.awaited = AwaitedSamples(database)
        self.futures = Futures(
            read_retention_s=retention_s, unread_retention_s=retention_s, max_pending_per_tenant=1000
        )
        self.completions = Completions(self.futures, self.awaited, lost_retention_s=retention_s)
        self.completions.start()

    def sample(self, client: SamplingClient = FIRST) -> str:
        request_id = self.futures.create("tenant")
        self.completions.expect(request_id, client)
        return request_id

    def end(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.futures.settle(request_id, DONE)
            self.completions.note_end(request_id)

    async def poll(self, cursor: int, client: SamplingClient = FIRST, hold_s: float = 0.0) -> tuple[list[str], int]:
        return await self.completions.poll(client, cursor, hold_s)


@pytest.fixture
def rig(database: Database) -> Rig:
    return Rig(database)


async def test_a_poll_tells_what_has_ended_since_its_cursor_in_order(rig: Rig) -> None:
    a, b, c, _pending = (rig.sample() for _ in range(4))
    rig.end(b, a)
    told, cursor = await rig.poll(0)
    assert told == [b, a]
    assert (await rig.poll(cursor))[0] == []
    rig.end(c)
    told, later = await rig.poll(cursor)
    assert told == [c]
    assert later > cursor


async def test_an_answer_that_was_lost_is_given_again(rig: Rig) -> None:
    a, b = rig.sample(), rig.sample()
    rig.end(a)
    first = await rig.poll(0)
    assert await rig.poll(0) == first
    rig.end(b)
    assert (await rig.poll(0))[0] == [a, b]
    assert (await rig.poll(first[1]))[0] == [b]


async def test_a_held_poll_is_answered_by_the_first_end_and_by_the_end_of_the_server(rig: Rig) -> None:
    a, _pending = rig.sample(), rig.sample()
    polls = [asyncio.create_task(rig.poll(0, hold_s=30.0)) for _ in range(2)]
    await asyncio.sleep(0.01)
    rig.end(a)
    (told, cursor), second = [await poll for poll in polls]
    assert told == [a]
    assert second == (told, cursor)
    held = asyncio.create_task(rig.poll(cursor, hold_s=30.0))
    await asyncio.sleep(0.01)
    rig.completions.release_polls()
    assert (await held)[0] == (await rig.poll(cursor, hold_s=30.0))[0] == []


async def test_each_client_hears_of_its_own_samples_only(rig: Rig) -> None:
    mine, clones, others = rig.sample(), rig.sample(CLONE), rig.sample(OTHER)
    rig.end(mine, clones, others)
    assert [(await rig.poll(0, client))[0] for client in (FIRST, CLONE, OTHER)] == [[mine], [clones], [others]]


def test_a_clients_samples_are_known_by_their_seq() -> None:
    assert SamplingClient.of_seq("s:sample:0", 999_999_999) == FIRST
    assert SamplingClient.of_seq("s:sample:0", 7_000_000_000) == CLONE


async def test_results_that_were_fetched_are_freed_but_only_those_of_the_client(rig: Rig) -> None:
    mine, pending, others = rig.sample(), rig.sample(), rig.sample(OTHER)
    rig.end(mine, others)
    rig.completions.free(FIRST, [mine, pending, others, "nonsense"])
    assert [rig.futures.known(request_id) for request_id in (mine, pending, others)] == [False, True, True]
    rig.completions.free(FIRST, [mine])
    rig.end(pending)
    assert (await rig.poll(0))[0] == [pending]


async def test_what_is_no_longer_kept_is_forgotten(database: Database) -> None:
    rig = Rig(database, retention_s=0.0)
    unread, pending = rig.sample(), rig.sample()
    rig.end(unread)
    rig.futures.sweep()
    rig.completions.sweep()
    assert set(rig.awaited.all()) == {pending}
    told, cursor = await rig.poll(0)
    assert told == []
    rig.completions.sweep()  # nothing is left of the log, and a later one counts on
    rig.end(pending)
    assert await rig.poll(cursor, hold_s=1.0) == ([pending], (await rig.poll(cursor))[1])
    assert (await rig.poll(cursor))[1] > cursor


async def test_after_a_restart_a_client_is_told_of_what_is_lost_and_goes_on(rig: Rig, database: Database) -> None:
    told, pending, ended = (rig.sample() for _ in range(3))
    rig.end(told)
    _, cursor = await rig.poll(0)
    await rig.poll(cursor)  # it knows
    rig.completions.sweep()
    rig.end(ended)

    later = Rig(database)
    lost, cursor = await later.poll(cursor)
    assert set(lost) == {pending, ended}
    assert [later.futures.peek(request_id) for request_id in lost] == [None, None]
    new = later.sample()
    later.end(new)
    assert (await later.poll(cursor))[0] == [new]
    later.completions.sweep()
    assert set(later.awaited.all()) == {new}


async def test_what_is_lost_is_not_told_for_ever(rig: Rig, database: Database) -> None:
    lost = rig.sample()
    later = Rig(database, retention_s=0.0)
    assert set(later.awaited.all()) == {lost}
    later.completions.sweep()
    later.completions.sweep()
    assert later.awaited.all() == {}
    assert (await later.poll(0))[0] == []
