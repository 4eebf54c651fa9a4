"""Position, reason and ETA of what waits, on a real engine."""

from __future__ import annotations

import asyncio

import numpy as np

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.records import Session, Tenant
from tuft.service.services import Services
from tuft.types import Datum, LoraSpec

DATA = tuple(Datum(np.arange(1, 400), {"target_tokens": np.arange(2, 401)}) for _ in range(8))


async def test_what_waits_knows_its_place_its_reason_and_about_how_long(
    services: Services, alice: Tenant, session: Session, settled: Settled
) -> None:
    run_id = f"{session.session_id}:train:0"
    await settled(await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2), {}))

    async def loss(seq: int) -> str:
        return await services.operations.forward_backward(alice, run_id, seq, DATA, "cross_entropy", {}, True)

    await settled(await loss(1))  # now the engine's pace is known
    futures = [await loss(seq) for seq in range(2, 12)]
    early = await loss(20)
    await asyncio.sleep(0.3)  # what is seen of the queue may be so old
    waiting = {future_id: pending for future_id, _, pending in await services.futures.waiting(alice, 100)}
    places = [waiting[future_id].position for future_id in futures if future_id in waiting]
    in_line = [place for place in places if place is not None]
    assert in_line == list(range(1, len(in_line) + 1))
    etas = [waiting[future_id].eta_s for future_id in futures if future_id in waiting]
    assert all(eta is not None for eta in etas)
    assert etas == sorted(etas)  # type: ignore[type-var]
    assert waiting[early].reason == "waits for seq_id 12 of its run, which has not come"
    last = waiting.get(futures[-1])
    assert last is None or last.state == "active" or f"of {len(in_line)} in line; done in about" in str(last.reason)
    for future_id in futures:
        await settled(future_id)
    await asyncio.sleep(0.3)
    await services.waits.look()
    assert services.waits.load().num_passes_with_engine == 0


async def test_others_waits_are_not_told(services: Services, alice: Tenant, session: Session) -> None:
    bob = services.tenants.authenticate(services.tenants.create_key("bob"))
    await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2), {})
    assert await services.futures.waiting(bob, 100) == []
    assert services.futures.num_waiting(bob) == 0
