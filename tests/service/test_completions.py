from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.service.parts import accepted, make_futures
from tuft.records import SamplingClient
from tuft.service.completions import Completions
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

    def __init__(self, database: Database, home: Path, retention_s: float = 60.0) -> None:
        self.futures = make_futures(database, home, read_retention_s=retention_s, unread_retention_s=retention_s)
        self.completions = Completions(self.futures)
        self._seqs = count()

    async def sample(self, client: SamplingClient = FIRST) -> str:
        request_id = await accepted(self.futures, next(self._seqs))
        self.completions.expect(request_id, client)
        return request_id

    def end(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.futures.settle(request_id, DONE)
            self.completions.note_end(request_id)

    async def sweep(self) -> None:
        await self.futures.writing.flush()
        self.completions.forget(await self.futures.sweep())
        self.completions.sweep()

    async def poll(self, cursor: int, client: SamplingClient = FIRST, hold_s: float = 0.0) -> tuple[list[str], int]:
        return await self.completions.poll(client, cursor, hold_s)


@pytest.fixture
async def rig(database: Database, tmp_path: Path) -> AsyncIterator[Rig]:
    running = Rig(database, tmp_path)
    yield running
    running.futures.writing.close()


async def test_a_poll_tells_what_has_ended_since_its_cursor_in_order(rig: Rig) -> None:
    a, b, c, _pending = [await rig.sample() for _ in range(4)]
    rig.end(b, a)
    told, cursor = await rig.poll(0)
    assert told == [b, a]
    assert (await rig.poll(cursor))[0] == []
    rig.end(c)
    told, later = await rig.poll(cursor)
    assert told == [c]
    assert later > cursor


async def test_an_answer_that_was_lost_is_given_again(rig: Rig) -> None:
    a, b = [await rig.sample() for _ in range(2)]
    rig.end(a)
    first = await rig.poll(0)
    assert await rig.poll(0) == first
    rig.end(b)
    assert (await rig.poll(0))[0] == [a, b]
    assert (await rig.poll(first[1]))[0] == [b]


async def test_a_held_poll_is_answered_by_the_first_end_and_by_the_end_of_the_server(rig: Rig) -> None:
    a, _pending = [await rig.sample() for _ in range(2)]
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
    mine, clones, others = await rig.sample(), await rig.sample(CLONE), await rig.sample(OTHER)
    rig.end(mine, clones, others)
    assert [(await rig.poll(0, client))[0] for client in (FIRST, CLONE, OTHER)] == [[mine], [clones], [others]]


def test_a_clients_samples_are_known_by_their_seq() -> None:
    assert SamplingClient.of_seq("s:sample:0", 999_999_999) == FIRST
    assert SamplingClient.of_seq("s:sample:0", 7_000_000_000) == CLONE


async def test_results_that_were_fetched_are_forgotten_but_only_those_of_the_client(
    database: Database, tmp_path: Path
) -> None:
    rig = Rig(database, tmp_path)
    rig.futures.retention._read_s = 0.0
    mine, pending, others = await rig.sample(), await rig.sample(), await rig.sample(OTHER)
    rig.end(mine, others)
    rig.completions.free(FIRST, [mine, pending, others, "nonsense"])
    await rig.sweep()
    assert [rig.futures.ended(request_id) is None for request_id in (mine, pending, others)] == [True, True, False]
    rig.end(pending)
    assert (await rig.poll(0))[0] == [pending]
    rig.futures.writing.close()


async def test_what_is_no_longer_kept_is_forgotten(database: Database, tmp_path: Path) -> None:
    rig = Rig(database, tmp_path, retention_s=0.0)
    unread, pending = [await rig.sample() for _ in range(2)]
    rig.end(unread)
    await rig.sweep()
    told, cursor = await rig.poll(0)
    assert told == []
    await rig.sweep()  # nothing is left of the log, and a later one counts on
    rig.end(pending)
    assert await rig.poll(cursor, hold_s=1.0) == ([pending], (await rig.poll(cursor))[1])
    assert (await rig.poll(cursor))[1] > cursor
    rig.futures.writing.close()


async def test_a_cursor_of_an_earlier_server_is_told_everything_again(
    rig: Rig, database: Database, tmp_path: Path
) -> None:
    ended = await rig.sample()
    rig.end(ended)
    _, cursor = await rig.poll(0)
    await rig.sweep()
    later = Rig(database, tmp_path)
    later.completions.expect(ended, FIRST)
    later.completions.note_end(ended)
    told, newer = await later.poll(cursor)
    assert told == [ended]
    assert newer > cursor
    later.futures.writing.close()
