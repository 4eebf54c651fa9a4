"""A server takes up what another had acknowledged: on a real engine and both databases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select, update

from tests.conftest import TINY_MODEL
from tuft.app import open_store
from tuft.config import load_config
from tuft.engine.worker import EngineProcess
from tuft.losses import CustomLoss
from tuft.records import FutureKey, Run, SamplerInfo, Session, Tenant, now
from tuft.service.calls import Call, CheckLoss, SampleCall, SaveForSampler, UnloadRun
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.store import tables
from tuft.types import (
    AdamParams,
    CustomLossCreated,
    Datum,
    ExternalSaved,
    Failure,
    FutureResult,
    LoraSpec,
    LossResult,
    OptimStepResult,
    RunCreated,
    RunUnloaded,
    SampleResult,
    SamplerSaved,
    SampleSpec,
    SamplingParams,
    WeightsSaved,
)

Server = Callable[..., Awaitable[Services]]
LARGE = tuple(Datum(np.arange(1, 100), {"target_tokens": np.arange(2, 101)}) for _ in range(20))


@pytest.fixture
async def server(config_file: Path, engine: EngineProcess, tmp_path: Path, database_url: str) -> AsyncIterator[Server]:
    """``await server()``: a server of one home; the next call is the next server, after the first was stopped, or
    ``killed``: it has ended nothing and written no snapshot."""
    lives: list[Services] = []
    databases = []

    async def start(*, killed: bool = False) -> Services:
        if lives and killed:
            for task in lives[-1]._tasks:
                task.cancel()
            await asyncio.to_thread(lives[-1].futures.writing.close)
        elif lives:
            await lives[-1].stop()
        config = load_config(config_file, home=tmp_path, database_url=database_url)
        databases.append(open_store(config))
        lives.append(Services(config, databases[-1], engine))
        await lives[-1].start()
        return lives[-1]

    yield start
    await lives[-1].stop()
    for database in databases:
        database.close()


async def settled(services: Services, tenant: Tenant, future_id: str) -> FutureResult | Failure:
    result = await services.futures.wait(tenant, future_id, hold_s=30.0)
    assert not isinstance(result, Pending)
    return result


async def begin(services: Services) -> tuple[Tenant, Session, str]:
    """A tenant with a session and a live run."""
    alice = services.tenants.authenticate(services.tenants.create_key("alice"))
    session = services.sessions.create(alice, (), {}, "test", None)
    created = await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2, seed=1), {})
    await settled(services, alice, created)
    return alice, session, f"{session.session_id}:train:0"


async def test_what_waited_is_done_by_the_next_server_in_its_order(server: Server) -> None:
    first = await server()
    alice, _, run_id = await begin(first)
    early = [
        await first.operations.forward_backward(alice, run_id, 3, LARGE, "cross_entropy", {}, True),
        await first.operations.optim_step(alice, run_id, 4, AdamParams()),
    ]
    assert any((first.config.home / "journal").glob("*/*.request")), "large data are files"
    second = await server()
    for seq in (1, 2):
        loss = await second.operations.forward_backward(alice, run_id, seq, LARGE[:1], "cross_entropy", {}, True)
    results = [await settled(second, alice, future_id) for future_id in (loss, *early)]
    assert [type(result) for result in results] == [LossResult, LossResult, OptimStepResult]
    third = await server()
    assert isinstance(await settled(third, alice, early[1]), OptimStepResult), "and results outlive their server"


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
async def test_a_run_goes_on_with_its_state_in_the_next_server(server: Server, killed: bool) -> None:
    first = await server()
    alice, session, run_id = await begin(first)

    async def step(services: Services, run: str, seq: int) -> float:
        loss = await services.operations.forward_backward(alice, run, seq, LARGE[:2], "cross_entropy", {}, True)
        await services.operations.optim_step(alice, run, seq + 1, AdamParams(learning_rate=0.1))
        result = await settled(services, alice, loss)
        assert isinstance(result, LossResult)
        return result.metrics["loss:sum"]

    seen = [await step(first, run_id, 1), await step(first, run_id, 3)]
    accumulated = await first.operations.forward_backward(alice, run_id, 5, LARGE, "cross_entropy", {}, True)
    assert isinstance(await settled(first, alice, accumulated), LossResult)
    assert bool(list((first.config.home / "snapshots").glob("*/*"))) is False
    second = await server(killed=killed)
    assert bool(list((first.config.home / "snapshots").glob("*/*"))) is not killed
    seen += [await step(second, run_id, 6), await step(second, run_id, 8)]
    spec = LoraSpec(rank=2, seed=1)
    await settled(second, alice, await second.runs.create(alice, session.session_id, 1, TINY_MODEL, spec, {}))
    twin = f"{session.session_id}:train:1"
    expected = [await step(second, twin, seq) for seq in (1, 3)]
    await second.operations.forward_backward(alice, twin, 5, LARGE, "cross_entropy", {}, True)
    assert [*expected, await step(second, twin, 6), await step(second, twin, 8)] == seen


async def test_a_request_that_the_disk_lost_fails_alone(server: Server) -> None:
    first = await server()
    alice, _, run_id = await begin(first)
    lost = await first.operations.forward_backward(alice, run_id, 2, LARGE, "cross_entropy", {}, True)
    kept = await first.operations.optim_step(alice, run_id, 3, AdamParams())
    for file in (first.config.home / "journal").glob("*/*.request"):
        file.write_bytes(file.read_bytes()[:-8])
    second = await server()
    await second.operations.optim_step(alice, run_id, 1, AdamParams())
    failed = await settled(second, alice, lost)
    assert isinstance(failed, Failure)
    assert failed.category == "server"
    assert "damaged" in failed.message
    assert isinstance(await settled(second, alice, kept), OptimStepResult)


async def test_a_run_that_was_unloaded_stays_so(server: Server) -> None:
    first = await server()
    alice, _, run_id = await begin(first)
    unloaded = await first.runs.unload(alice, run_id)
    assert await settled(first, alice, unloaded) == RunUnloaded(run_id)
    second = await server()
    assert await second.runs.unload(alice, run_id) == unloaded
    assert second.runs.get(alice, run_id).status == "unloaded"
    late = await settled(second, alice, await second.operations.optim_step(alice, run_id, 1, AdamParams()))
    assert isinstance(late, Failure)
    assert "is unloaded" in late.message


# --- killed between two writes ----------------------------------------------------------------------------------------


async def acknowledge(services: Services, tenant: Tenant, key: FutureKey, call: Call) -> str:
    """What a server has written that was killed before it did anything about it."""
    prepared = services.futures.prepare(call, lambda: (call, 0))
    future_id, _ = await services.futures.accept(tenant, key, type(call).__name__, prepared)
    return future_id


GRAPH = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
    {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
    {"op": "output", "name": "output", "target": "output", "args": [[{"ref": "total"}, {"dict": {}}]]},
]
LOSS = CustomLoss("total", (("logprobs", 1),), json.dumps(GRAPH))
SAMPLE = SampleCall(SampleSpec((1, 2, 3), SamplingParams(max_tokens=4, stop=(), seed=5)))


async def test_samples_losses_and_unloads_that_were_acknowledged_are_done_once(server: Server) -> None:
    first = await server()
    alice, session, run_id = await begin(first)
    sampler_id = first.samplers.create(alice, session.session_id, 0, TINY_MODEL, None).sampler_id
    accepted = [
        await acknowledge(first, alice, FutureKey("sample", sampler_id, 0), SAMPLE),
        await acknowledge(
            first, alice, FutureKey("custom_loss", session.session_id, 0), CheckLoss(session.session_id, LOSS)
        ),
        await acknowledge(first, alice, FutureKey("unload", run_id, 0), UnloadRun(run_id)),
    ]
    second = await server(killed=True)
    results = [await settled(second, alice, future_id) for future_id in accepted]
    assert [type(result) for result in results] == [SampleResult, CustomLossCreated, RunUnloaded]
    assert second.runs.get(alice, run_id).status == "unloaded"
    third = await server(killed=True)
    assert third.futures.num_pending == 0
    assert [await settled(third, alice, future_id) for future_id in accepted][1:] == results[1:]
    again = [
        (await third.samplers.sample(alice, sampler_id, 0, SAMPLE.spec))[0],
        await third.custom_losses.create(alice, session.session_id, 0, LOSS),
        await third.runs.unload(alice, run_id),
    ]
    assert again == accepted
    assert await used(third, "sample") == 4


async def used(services: Services, kind: str) -> int:
    """Tokens of the ledger."""
    ledger = tables.ledger.c
    rows = services._journal._database.all(select(ledger.quantity).where(ledger.kind == kind))
    return sum(row.quantity for row in rows)


def damage(services: Services, future_id: str) -> None:
    """Flip a bit of the request."""
    database = services._journal._database
    column = tables.futures.c
    content = bytearray(services._journal.content(future_id, "request"))
    content[-3] ^= 1
    with database.transaction() as connection:
        connection.execute(update(tables.futures).where(column.future_id == future_id).values(request=bytes(content)))


async def test_a_damaged_sample_or_loss_fails_alone(server: Server) -> None:
    first = await server()
    alice, session, _ = await begin(first)
    sampler_id = first.samplers.create(alice, session.session_id, 0, TINY_MODEL, None).sampler_id
    call = CheckLoss(session.session_id, LOSS)
    keys = [(FutureKey("sample", sampler_id, seq), SAMPLE) for seq in range(2)]
    keys += [(FutureKey("custom_loss", session.session_id, seq), call) for seq in range(2)]  # type: ignore[misc]
    accepted = [await acknowledge(first, alice, *one) for one in keys]
    for future_id in accepted[::2]:
        damage(first, future_id)
    second = await server(killed=True)
    results = [await settled(second, alice, future_id) for future_id in accepted]
    assert [type(result) for result in results] == [Failure, SampleResult, Failure, CustomLossCreated]
    assert all("damaged" in result.message for result in results if isinstance(result, Failure))


async def test_a_creation_that_was_never_acknowledged_may_be_asked_for_again(server: Server) -> None:
    first = await server()
    alice, session, _ = await begin(first)
    moment, run_id = now(), f"{session.session_id}:train:7"
    spec = LoraSpec(rank=2)
    first.runs._catalog.add_run(
        Run(run_id, alice.tenant_id, session.session_id, 7, TINY_MODEL, spec, "creating", moment, moment, {})
    )
    second = await server(killed=True)
    created = await second.runs.create(alice, session.session_id, 7, TINY_MODEL, spec, {})
    assert await settled(second, alice, created) == RunCreated(run_id)


async def test_a_creation_that_was_acknowledged_is_done(server: Server) -> None:
    first = await server()
    alice, session, _ = await begin(first)
    created = await first.runs.create(alice, session.session_id, 7, TINY_MODEL, LoraSpec(rank=2), {})
    second = await server(killed=True)
    run_id = f"{session.session_id}:train:7"
    assert await settled(second, alice, created) == RunCreated(run_id)
    step = await second.operations.optim_step(alice, run_id, 1, AdamParams())
    assert isinstance(await settled(second, alice, step), OptimStepResult)


async def test_what_an_ended_run_still_had_waiting_gets_its_error_from_the_next_server(server: Server) -> None:
    first = await server()
    alice, _, run_id = await begin(first)
    waiting = await first.operations.optim_step(alice, run_id, 2, AdamParams())
    first.runs._catalog.set_run_status(run_id, "unloaded")  # and then it was killed
    second = await server(killed=True)
    failed = await settled(second, alice, waiting)
    assert isinstance(failed, Failure)
    assert f"run {run_id} has ended" in failed.message
    assert second.futures.num_pending == 0


async def test_a_save_whose_result_was_lost_is_not_saved_again(server: Server) -> None:
    first = await server()
    alice, _, run_id = await begin(first)
    operations = first.operations
    saves = [
        await operations.save_weights(alice, run_id, 1, "x", None, False, {}),
        await operations.save_weights_for_sampler(alice, run_id, 2, "x", None, None, {}),
        await operations.save_weights_for_sampler(alice, run_id, 3, None, 9, None, {}),
        await operations.save_weights_external(alice, run_id, 4, "x", None, None),
    ]
    results = [await settled(first, alice, future_id) for future_id in saves]
    assert [type(result) for result in results] == [WeightsSaved, SamplerSaved, SamplerSaved, ExternalSaved]
    directories = sorted(first.config.home.glob("checkpoints/*/*/*"))
    await first.futures.writing.flush()
    with first._journal._database.transaction() as connection:  # as if it had been killed before it wrote them
        lost = tables.futures.c.future_id.in_(saves)
        connection.execute(update(tables.futures).where(lost).values(outcome=None, result=None, result_bytes=None))
    second = await server(killed=True)
    assert [await settled(second, alice, future_id) for future_id in saves] == results
    assert sorted(second.config.home.glob("checkpoints/*/*/*")) == directories


async def test_weights_that_were_not_published_yet_are_by_the_next_server(server: Server) -> None:
    first = await server()
    alice, session, run_id = await begin(first)
    published = await first.operations.save_weights_for_sampler(alice, run_id, 1, None, 8, None, {}, "inflight")
    earlier = await settled(first, alice, published)
    assert isinstance(earlier, SamplerSaved)
    assert earlier.sampling_session_id is not None
    call = SaveForSampler(None, 9, None, {}, "inflight")
    waiting = await acknowledge(first, alice, FutureKey("operation", run_id, 2), call)
    run = first.runs.get(alice, run_id)
    state = await first.checkpoints.read(
        first.samplers.get(alice, earlier.sampling_session_id).directory or "", with_optimizer=False
    )
    directory, _ = await first.checkpoints.write(run, "ephemeral", state)
    sampler_id = f"{session.session_id}:sample:9"
    first.samplers._catalog.add_sampler(
        SamplerInfo(
            sampler_id, alice.tenant_id, session.session_id, 9, TINY_MODEL, None, directory, now(), run_id, saved_seq=2
        )
    )
    second = await server(killed=True)
    assert await settled(second, alice, waiting) == SamplerSaved(None, sampler_id)
    assert second.samplers.get(alice, earlier.sampling_session_id).directory == directory


async def test_a_tenant_has_what_is_pending_in_its_quota_also_in_the_next_server(server: Server) -> None:
    first = await server()
    alice, _, run_id = await begin(first)
    for seq in (2, 3):
        await first.operations.optim_step(alice, run_id, seq, AdamParams())
    second = await server(killed=True)
    assert second.quotas.num_waiting(alice.tenant_id) == 2
    await second.operations.optim_step(alice, run_id, 1, AdamParams())
    await settled(second, alice, await second.operations.optim_step(alice, run_id, 4, AdamParams()))
    assert second.quotas.num_waiting(alice.tenant_id) == 0
