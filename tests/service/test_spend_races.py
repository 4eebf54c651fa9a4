"""A thousand requests race for the last of a cap, through the real service floor, engine and database."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tuft.app import open_store
from tuft.config import load_config
from tuft.engine.worker import EngineProcess
from tuft.errors import CapReached
from tuft.metering import COSTS_A_UNIT, cost_of
from tuft.records import Tenant
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.store.usage import FOLDED, UsageTable
from tuft.types import Datum, LoraSpec, SampleResult, SampleSpec, SamplingParams

CAP = 0.05
PRICES = {"train": 10.0, "prefill": 5.0, "cached_prefill": 1.0, "sample": 40.0}
NUM_SAMPLES, NUM_RUNS, NUM_LOSSES = 800, 8, 25


@pytest.fixture
async def services(config_file: Path, engine: EngineProcess, tmp_path: Path) -> AsyncIterator[Services]:
    options = {f"prices.{name}": price for name, price in PRICES.items()}
    runs = {"limits.max_runs_per_tenant": NUM_RUNS}
    config = load_config(config_file, home=tmp_path, **options, **runs, **{"quotas.spend_total": CAP})
    database = open_store(config)
    running = Services(config, database, engine)
    await running.start()
    yield running
    await running.stop()
    database.close()


def spent(services: Services, tenant: Tenant) -> float:
    database = open_store(services.config)
    try:
        sums = UsageTable(database).sums(FOLDED, tenant.tenant_id)
    finally:
        database.close()
    return sum(cost_of(one.kind, one.quantity, one.rate) for one in sums) / COSTS_A_UNIT


async def test_of_a_thousand_racing_requests_none_goes_over_the_cap(services: Services, alice: Tenant) -> None:
    session = services.sessions.create(alice, (), {}, "test", None)
    sampler = services.samplers.create(alice, session.session_id, 0, TINY_MODEL, None)
    creating = [
        await services.runs.create(alice, session.session_id, number, TINY_MODEL, LoraSpec(2), {})
        for number in range(NUM_RUNS)
    ]
    assert not [one for one in await asyncio.gather(*(ended(services, alice, one) for one in creating)) if not one]
    dice = random.Random(0)

    async def sample(number: int) -> str | None:
        await asyncio.sleep(dice.random() / 20)
        spec = SampleSpec(tuple(range(1, dice.randint(2, 8))), SamplingParams(max_tokens=dice.randint(1, 8)))
        try:
            return (await services.samplers.sample(alice, sampler.sampler_id, number, spec))[0]
        except CapReached:
            return None

    async def loss(run: int, seq: int) -> str | None:
        tokens = np.arange(1, dice.randint(3, 20))
        await asyncio.sleep(dice.random() / 20)
        try:
            return await services.operations.forward_backward(
                alice,
                f"{session.session_id}:train:{run}",
                seq,
                (Datum(tokens, {"target_tokens": tokens}),),
                "cross_entropy",
                {},
                backward=True,
            )
        except CapReached:
            return None

    races = [*(sample(number) for number in range(NUM_SAMPLES))]
    races += [loss(run, seq) for run in range(NUM_RUNS) for seq in range(1, 1 + NUM_LOSSES)]
    dice.shuffle(races)
    accepted = [one for one in await asyncio.gather(*races) if one is not None]
    assert 0 < len(accepted) < len(races) == 1000
    results = await asyncio.gather(*(ended(services, alice, one) for one in accepted))
    assert any(isinstance(result, SampleResult) for result in results)
    await services.futures.writing.settled()
    total = spent(services, alice)
    assert CAP / 2 < total <= CAP


async def ended(services: Services, tenant: Tenant, future_id: str) -> object:
    result = await services.futures.wait(tenant, future_id, hold_s=60.0)
    assert not isinstance(result, Pending)
    return result
