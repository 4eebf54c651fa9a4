"""Runs that leave the engine and come back, on a real engine and both databases."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.engine.worker import EngineProcess
from tuft.errors import QuotaExceeded
from tuft.records import JournaledFuture, Run, Session, Tenant
from tuft.service.aside import MAX_DEATHS
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.types import AdamParams, Datum, Failure, LoraSpec, LossResult, RunCreated, WeightsLoaded

DATUM = Datum(np.asarray([1, 2, 3, 4]), {"target_tokens": np.asarray([2, 3, 4, 5])})


class Trained:
    """A run whose seqs are counted."""

    def __init__(self, services: Services, tenant: Tenant, run_id: str, settled: Settled) -> None:
        self.services, self.tenant, self.run_id, self.settled = services, tenant, run_id, settled
        self._seq = 0

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    async def step(self) -> float:
        """The loss before the step."""
        first, _ = self.next_seq(), self.next_seq()
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
    assert "create_training_client_from_state" in failed.message
    assert services.runs.get(alice, run.run_id).status == "lost"
    await other.step()


async def test_a_disk_that_is_away_for_a_while_is_a_delay(
    services: Services, train: Train, twin: Callable[[int], Awaitable[list[float]]], settled: Settled, alice: Tenant
) -> None:
    run = await train(0)
    losses = [await run.step(), await run.step()]
    make_small(services, 1.2)
    await train(1)
    there = services.config.home / "snapshots"
    away = there.rename(there.with_name("not-mounted"))
    operation = (alice, run.run_id, run.next_seq(), (DATUM,), "cross_entropy", {}, True)
    waiting = await services.operations.forward_backward(*operation)
    assert isinstance(await services.futures.wait(alice, waiting, hold_s=1.0), Pending)
    away.rename(there)
    result = await settled(waiting)
    assert isinstance(result, LossResult)
    services.residency._max_bytes = 2**40
    assert [*losses, result.metrics["loss:sum"]] == await twin(3)


async def test_runs_that_begin_at_once_take_no_more_than_there_is(services: Services, train: Train) -> None:
    first = await train(0)
    make_small(services, 1.5)
    others = asyncio.gather(train(1), train(2))
    most = 0
    while not others.done():
        residency = services.residency
        most = max(most, len({run for run in residency._generations if residency.holds(run)} | residency._coming))
        await asyncio.sleep(0)
    assert most == 1
    assert len({await run.step() for run in (first, *await others)}) == 1


async def test_loads_of_runs_that_are_there_do_not_wait_for_each_other(
    services: Services, train: Train, settled: Settled, alice: Tenant
) -> None:
    runs = [await train(0), await train(1)]
    paths = []
    for run in runs:
        saving = (alice, run.run_id, run.next_seq(), "x", None, False, {})
        await settled(await services.operations.save_weights(*saving))
        paths.append(f"tinker://{run.run_id}/weights/x")
    make_small(services, 1.2)  # as if both had come while the disk took no snapshot
    loading = [
        await services.operations.load_weights(alice, run.run_id, run.next_seq(), path, True, None)
        for run, path in zip(runs, paths, strict=True)
    ]
    assert all([isinstance(await settled(future_id), WeightsLoaded) for future_id in loading])
    assert await runs[0].step() == await runs[1].step()


async def test_a_run_that_ends_while_it_is_brought_in_disturbs_nobody(
    services: Services, train: Train, settled: Settled, alice: Tenant
) -> None:
    run = await train(0)
    await run.step()
    make_small(services, 1.2)
    other = await train(1)
    waiting = await services.operations.optim_step(alice, run.run_id, run.next_seq(), AdamParams())
    await settled(await services.runs.unload(alice, run.run_id))
    assert isinstance(await settled(waiting), Failure)
    await other.step()
    assert services.runs.get(alice, run.run_id).status == "unloaded"
    assert services.residency.num_resident == 1
    assert not list((services.config.home / "snapshots").glob(f"{run.run_id}/*"))


async def test_a_request_that_a_run_needs_to_come_back_and_the_disk_lost_ends_that_run_alone(
    services: Services, train: Train, settled: Settled, alice: Tenant
) -> None:
    data = tuple(Datum(np.arange(1, 100), {"target_tokens": np.arange(2, 101)}) for _ in range(20))
    run, other = await train(0), await train(1)
    large = (alice, run.run_id, run.next_seq(), data, "cross_entropy", {}, True)
    assert isinstance(await settled(await services.operations.forward_backward(*large)), LossResult)
    (file,) = (services.config.home / "journal").glob("*/*.request")
    file.unlink()
    services.residency._generations.clear()  # as after the death of the engine
    failed = await settled(await services.operations.optim_step(alice, run.run_id, run.next_seq(), AdamParams()))
    assert isinstance(failed, Failure)
    assert "create_training_client_from_state" in failed.message
    assert services.runs.get(alice, run.run_id).status == "lost"
    await other.step()


async def test_a_step_that_failed_in_the_engine_fails_again_when_its_run_comes_back(
    services: Services, train: Train, settled: Settled, alice: Tenant
) -> None:
    """It has taken the gradients: without it, those of the next step would be others."""

    async def losses(number: int, *, is_disturbed: bool) -> list[float]:
        run = await train(number)
        huge = {"advantages": np.full(4, 1e30, np.float32), "logprobs": np.zeros(4, np.float32)}
        data = (Datum(DATUM.tokens_T, {**DATUM.loss_fn_inputs, **huge}),)
        operation = (alice, run.run_id, run.next_seq(), data, "importance_sampling", {}, True)
        assert isinstance(await settled(await services.operations.forward_backward(*operation)), LossResult)
        failed = await settled(await services.operations.optim_step(alice, run.run_id, run.next_seq(), AdamParams()))
        assert isinstance(failed, Failure)
        assert "They were discarded" in failed.message
        first = await run.step()
        if is_disturbed:
            services.residency._generations.clear()  # as after the death of the engine
        return [first, await run.step()]

    assert await losses(1, is_disturbed=True) == await losses(2, is_disturbed=False)


@pytest.mark.slow
async def test_a_run_that_engines_die_of_is_set_aside_and_everybody_else_goes_on(
    services: Services, train: Train, settled: Settled, alice: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = await train(0), await train(1)
    saved = (alice, run.run_id, run.next_seq(), "x", None, False, {})
    await settled(await services.operations.save_weights(*saved))
    before = [await run.step(), await other.step()]
    monkeypatch.setattr("tuft.service.aside._PAUSE_S", 0.01)
    residency, engine = services.residency, services.residency._engine
    assert isinstance(engine, EngineProcess)
    replay, num_deaths = residency._replay, 0

    async def deadly(restored: Run, done: Sequence[JournaledFuture]) -> int:
        nonlocal num_deaths
        if restored.run_id == run.run_id:
            num_deaths += 1
            pid = engine.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        return await replay(restored, done)

    monkeypatch.setattr(residency, "_replay", deadly)
    residency.discard(run.run_id)
    doomed = [
        await services.operations.forward_backward(
            alice, run.run_id, run.next_seq(), (DATUM,), "cross_entropy", {}, True
        ),
        await services.operations.optim_step(alice, run.run_id, run.next_seq(), AdamParams()),
    ]
    failed = [await services.futures.wait(alice, future_id, hold_s=120.0) for future_id in doomed]
    for one in failed:
        assert isinstance(one, Failure)
        assert one.category == "server"
        assert f"the engine died {MAX_DEATHS} times" in one.message
        assert "load_state" in one.message
    assert num_deaths == MAX_DEATHS
    assert await other.step() < before[1]
    assert num_deaths == MAX_DEATHS, "nobody tries it again"
    loading = (alice, run.run_id, run.next_seq(), f"tinker://{run.run_id}/weights/x", True, None)
    assert isinstance(await settled(await services.operations.load_weights(*loading)), WeightsLoaded)
    assert await run.step() == before[0]


async def test_operations_of_a_run_whose_base_model_is_not_configured_fail_until_it_is(
    services: Services, train: Train, settled: Settled, alice: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await train(0)
    await run.step()
    there = services.models.all
    services.residency.discard(run.run_id)
    with monkeypatch.context() as patched:
        other = (replace(there[0], name="another-model", aliases=()),)
        patched.setattr(type(services.models), "all", property(lambda _: other))
        for _ in range(2):
            failed = await settled(
                await services.operations.optim_step(alice, run.run_id, run.next_seq(), AdamParams())
            )
            assert isinstance(failed, Failure)
            assert failed.category == "server"
            assert repr(TINY_MODEL) in failed.message
            assert "this server has 'another-model'" in failed.message
    await run.step()


async def test_a_run_that_has_left_memory_takes_none_of_the_resident_bytes(
    services: Services, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await train(0)
    monkeypatch.setitem(services.quotas._options, "resident_bytes", 1.5 * services.residency._bytes(run.run_id))
    with pytest.raises(QuotaExceeded, match="resident_bytes"):
        await train(1)
    services.residency.discard(run.run_id)
    await train(1)
