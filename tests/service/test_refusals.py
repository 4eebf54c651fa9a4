"""A run whose operation a quota refused waits for it, as long as its client comes back; then it goes on behind it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.app import open_store
from tuft.errors import CapReached
from tuft.metering import QUOTA_NAMES, Holder
from tuft.records import Session, Tenant
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.store.quotas import QuotaTable
from tuft.types import AdamParams, Datum, LoraSpec, LossResult, OptimStepResult

TOKENS = np.arange(1, 9)
GAP_S = 1.0
"""``seq_gap_timeout_s`` of the service fixture."""


@pytest.fixture
async def run_id(services: Services, alice: Tenant, session: Session, settled: Settled) -> str:
    await settled(await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(2), {}))
    return f"{session.session_id}:train:0"


def allow(services: Services, tenant: Tenant, tokens_per_day: float | None) -> None:
    """None: whatever they want."""
    database = open_store(services.config)
    table = QuotaTable(database)
    if tokens_per_day is None:
        table.set(Holder(tenant.tenant_id), {}, QUOTA_NAMES)
    else:
        table.set(Holder(tenant.tenant_id), {"tokens_per_day": tokens_per_day}, ())
    database.close()
    services.quotas._refresh_at_s = 0.0


async def train(services: Services, tenant: Tenant, run_id: str, seq: int) -> str:
    data = (Datum(TOKENS, {"target_tokens": TOKENS}),)
    return await services.operations.forward_backward(tenant, run_id, seq, data, "cross_entropy", {}, backward=True)


async def test_a_later_seq_waits_beyond_the_gap_while_the_refused_one_is_tried_again(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    allow(services, alice, 0)
    with pytest.raises(CapReached):
        await train(services, alice, run_id, 1)
    step = await services.operations.optim_step(alice, run_id, 2, AdamParams())
    for _ in range(10):
        with pytest.raises(CapReached):
            await train(services, alice, run_id, 1)
        await asyncio.sleep(GAP_S / 4)
    assert isinstance(await services.futures.wait(alice, step, hold_s=0.0), Pending)
    allow(services, alice, None)
    assert isinstance(await settled(await train(services, alice, run_id, 1)), LossResult)
    assert isinstance(await settled(step), OptimStepResult)


async def test_one_that_its_client_gave_up_has_its_turn_as_an_error_and_the_run_goes_on(
    services: Services, alice: Tenant, run_id: str, settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuft.service.refusals.GIVEN_UP_AFTER_S", 0.0)
    allow(services, alice, 0)
    with pytest.raises(CapReached):
        await train(services, alice, run_id, 1)
    step = await services.operations.optim_step(alice, run_id, 2, AdamParams())
    assert isinstance(await settled(step), OptimStepResult)
    allow(services, alice, None)
    assert isinstance(await settled(await train(services, alice, run_id, 3)), LossResult)


async def test_one_that_nothing_waits_for_may_still_come(
    services: Services, alice: Tenant, run_id: str, settled: Settled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuft.service.refusals.GIVEN_UP_AFTER_S", 0.0)
    allow(services, alice, 0)
    with pytest.raises(CapReached):
        await train(services, alice, run_id, 1)
    await asyncio.sleep(1.5 * GAP_S)
    allow(services, alice, None)
    assert isinstance(await settled(await train(services, alice, run_id, 1)), LossResult)


async def test_a_refusal_is_journaled_nowhere_and_costs_nothing(services: Services, alice: Tenant, run_id: str) -> None:
    allow(services, alice, len(TOKENS) - 1)
    for _ in range(3):
        with pytest.raises(CapReached):
            await train(services, alice, run_id, 1)
    assert services.futures.num_pending == 0
    assert services.quotas.num_waiting(alice.tenant_id) == 0
