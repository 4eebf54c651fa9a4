from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import pairwise

from tuft.turns import Turns


async def rounds(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_round_does_so_much_and_the_next_goes_on_in_order() -> None:
    turns, done = Turns(2), []
    for number in range(7):
        turns.take(lambda number=number: done.append(number))
    seen = [list(done)]
    while len(done) < 7:
        await rounds(1)
        seen.append(list(done))
    assert done == [0, 1, 2, 3, 4, 5, 6]
    assert all(len(after) - len(before) <= 2 for before, after in pairwise(seen))


async def test_whoever_finds_nobody_waiting_goes_at_once() -> None:
    turns, done = Turns(1), []
    turns.take(lambda: done.append(1))
    await rounds(3)
    turns.take(lambda: done.append(2))
    assert done == [1, 2]


async def test_others_are_served_between_the_turns_of_many() -> None:
    turns, order = Turns(1), []

    async def one(name: str) -> None:
        await turns.turn()
        order.append(name)

    tasks = [asyncio.create_task(one(f"many {number}")) for number in range(50)]
    await rounds(2)
    order.append("urgent")
    await asyncio.gather(*tasks)
    assert order.index("urgent") < 10


async def test_one_who_goes_away_keeps_nobody_waiting() -> None:
    turns = Turns(1)
    turns.take(lambda: None)
    gone = asyncio.create_task(turns.turn())
    await rounds(1)
    gone.cancel()
    with suppress(asyncio.CancelledError):
        await gone
    await asyncio.wait_for(turns.turn(), 5)
