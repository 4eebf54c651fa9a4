"""Runs that leave the engine and come back, on a real engine and both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.records import Session, Tenant
from tuft.service.services import Services
from tuft.types import AdamParams, Datum, Failure, LoraSpec, LossResult, RunCreated

DATUM = Datum(np.asarray([1, 2, 3, 4]), {"target_tokens": np.asarray([2, 3, 4, 5])})


class Trained:
    """A run whose seqs are counted."""

    def __init__(self, services: Services, tenant: Tenant, run_id: str, settled: Settled) -> None:
        self.services, self.tenant, self.run_id, self.settled = services, tenant, run_id, settled
        self._seq = 0

    async def step(self) -> float:
        """The loss before the step."""
        first = self._seq + 1
        self._seq += 2
        operations, who = self.services.operations, (self.tenant, self.run_id)
        loss = await operations.forward_backward(*who, first, (DATUM,), "cross_entropy", {}, True)
        step = await operations.optim_step(*who, first + 1, AdamParams(learning_rate=0.1))
        result = await self.settled(loss)
        assert isinstance(result, LossResult), result
        assert not isinstance(await self.settled(step), Failure)
        return result.metrics["loss:sum"]


Train = Callable[[int], Awaitable[Trained]]


@pytest.fixture
def train(services: Services, alice: Tenant, session: Session, settled: Settled) -> Train:
    async def begin(number: int) -> Trained:
        spec = LoraSpec(rank=2, seed=7)
        created = await settled(await services.runs.create(alice, session.session_id, number, TINY_MODEL, spec, {}))
        assert isinstance(created, RunCreated)
        return Trained(services, alice, created.run_id, settled)

    return begin


@pytest.fixture
def twin(train: Train) -> Callable[[int], Awaitable[list[float]]]:
    """The losses of a run of the same seed that nobody disturbs."""

    async def losses(num_steps: int) -> list[float]:
        run = await train(2)
        return [await run.step() for _ in range(num_steps)]

    return losses


def make_small(services: Services, num_runs: float) -> None:
    """Memory for so many runs."""
    runs = services.residency._runs.values()
    services.residency._max_bytes = int(num_runs * max(services.residency._bytes(run.run_id) for run in runs))


async def test_runs_that_do_not_fit_take_turns_and_keep_their_state(
    services: Services, train: Train, twin: Callable[[int], Awaitable[list[float]]]
) -> None:
    first = await train(0)
    make_small(services, 1.5)
    runs = [first, await train(1)]
    losses = [[await run.step() for run in runs] for _ in range(4)]
    assert services.residency.num_resident == 1
    services.residency._max_bytes = 2**40
    expected = await twin(4)
    assert losses == [[loss, loss] for loss in expected]


async def test_runs_that_all_have_work_make_progress_though_one_fits(services: Services, train: Train) -> None:
    first = await train(0)
    make_small(services, 1.2)
    runs = [first, await train(1), await train(2)]
    losses = await asyncio.gather(*(run.step() for run in runs for _ in range(3)))
    assert len(losses) == 9
    assert losses[:3] == losses[3:6] == losses[6:]


async def test_a_run_is_brought_in_once_however_often_it_is_asked_for(services: Services, train: Train) -> None:
    run = await train(0)
    before = [await run.step()]
    make_small(services, 1.2)
    await train(1)
    assert not services.residency.is_resident(run.run_id)
    for _ in range(5):
        services.residency.bring(run.run_id)
        await asyncio.sleep(0)
    assert len(services.residency._bringing) == 1
    assert await run.step() < before[0]


async def test_a_damaged_snapshot_ends_its_run_alone_and_says_how_to_go_on(
    services: Services, train: Train, settled: Settled, alice: Tenant
) -> None:
    run = await train(0)
    await run.step()
    make_small(services, 1.2)
    other = await train(1)
    (file,) = (services.config.home / "snapshots" / run.run_id).glob("*/optimizer.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    failed = await settled(await services.operations.optim_step(alice, run.run_id, 3, AdamParams()))
    assert isinstance(failed, Failure)
    assert failed.category == "user"
    assert "load_state(path)" in failed.message
    assert services.runs.get(alice, run.run_id).status == "lost"
    await other.step()
