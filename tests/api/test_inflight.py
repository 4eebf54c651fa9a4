"""``limits.max_inflight_bytes``: what many large requests hold together."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.calls import TOKENS, cross_entropy, post, result
from tests.api.conftest import Served
from tuft.api import inflight
from tuft.api.inflight import HeldResponse, InFlight
from tuft.errors import Overloaded

MOST = 2**22


@pytest.fixture
def held() -> InFlight:
    return InFlight(MOST)


async def soon(work: Any) -> bool:
    """True if it can go on at once."""
    task = asyncio.ensure_future(work)
    for _ in range(5):
        await asyncio.sleep(0)
    return task.done()


async def test_what_does_not_fit_waits_until_something_is_released(held: InFlight) -> None:
    first = await held.take("alice", MOST // 2)
    await held.take("bob", MOST // 2)
    waiting = asyncio.create_task(held.take("carol", MOST // 2))
    assert not await soon(asyncio.shield(waiting))
    first.release()
    first.release()  # once is enough
    await waiting
    assert held.num_bytes == MOST


async def test_one_tenant_has_at_most_half_while_it_has_anything(held: InFlight) -> None:
    whole = await held.take("alice", 3 * MOST)
    assert held.num_bytes == MOST
    whole.release()
    await held.take("alice", MOST // 2)
    assert not await soon(held.take("alice", MOST // 4))
    assert await soon(held.take("bob", MOST // 4))


async def test_whoever_came_first_is_served_first(held: InFlight) -> None:
    all_of_it = await held.take("alice", MOST)
    large = asyncio.create_task(held.take("bob", MOST))
    small = asyncio.create_task(held.take("carol", MOST // 4))
    all_of_it.release()
    (await large).release()
    await small


async def test_small_requests_never_wait(held: InFlight) -> None:
    await held.take("alice", MOST)
    assert await soon(held.take("bob", 2**16))


async def test_one_who_waits_too_long_is_told_the_limit(held: InFlight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "_PATIENCE_S", 0.05)
    hold = await held.take("alice", MOST)
    with pytest.raises(Overloaded, match=f"limits.max_inflight_bytes is {MOST}"):
        await held.take("bob", MOST)
    hold.release()
    assert held.num_bytes == 0
    await held.take("bob", MOST)


async def test_one_who_goes_away_leaves_nothing_behind(held: InFlight) -> None:
    hold = await held.take("alice", MOST)
    waiting = asyncio.create_task(held.take("bob", MOST))
    await asyncio.sleep(0)
    hold.release()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert held.num_bytes == 0


async def test_an_answer_is_held_until_its_reader_has_it(held: InFlight) -> None:
    hold = await held.take("alice", MOST)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        assert held.num_bytes == MOST
        sent.append(bytes(message.get("body", b"")))

    await HeldResponse(b"x" * (2**21 + 1), hold, "text/plain")({}, None, send)  # type: ignore[arg-type]
    assert b"".join(sent) == b"x" * (2**21 + 1)
    assert held.num_bytes == 0


def test_a_server_that_has_served_holds_nothing(server: Served, run_id: str) -> None:
    padding = "x" * 200_000

    def forward(seq_id: int) -> Any:
        return post(
            server.alice,
            "forward",
            model_id=run_id,
            seq_id=seq_id,
            forward_input=cross_entropy(TOKENS),
            padding=padding,
        )

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(forward, range(1, 9)))
    for answer in answers:
        assert "metrics" in result(server.alice, answer)
    assert post(server.alice, "forward", model_id="", padding=padding).status_code == 400
    assert server.inflight.num_bytes == 0
