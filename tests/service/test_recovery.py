"""A server takes up what another had acknowledged: on a real engine and both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tuft.app import open_store
from tuft.config import load_config
from tuft.engine.worker import EngineProcess
from tuft.records import Session, Tenant
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.types import AdamParams, Datum, Failure, FutureResult, LoraSpec, LossResult, OptimStepResult, RunUnloaded

Server = Callable[[], Awaitable[Services]]
LARGE = tuple(Datum(np.arange(1, 100), {"target_tokens": np.arange(2, 101)}) for _ in range(20))


@pytest.fixture
async def server(config_file: Path, engine: EngineProcess, tmp_path: Path, database_url: str) -> AsyncIterator[Server]:
    """``await server()``: a server of one home; the next call is the next server, after the first was stopped."""
    lives: list[Services] = []
    databases = []

    async def start() -> Services:
        if lives:
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


async def test_a_run_goes_on_with_its_state_in_the_next_server(server: Server) -> None:
    first = await server()
    alice, session, run_id = await begin(first)

    async def step(services: Services, run: str, seq: int) -> float:
        loss = await services.operations.forward_backward(alice, run, seq, LARGE[:2], "cross_entropy", {}, True)
        await services.operations.optim_step(alice, run, seq + 1, AdamParams(learning_rate=0.1))
        result = await settled(services, alice, loss)
        assert isinstance(result, LossResult)
        return result.metrics["loss:sum"]

    killed = [await step(first, run_id, 1), await step(first, run_id, 3)]
    second = await server()
    killed += [await step(second, run_id, 5)]
    spec = LoraSpec(rank=2, seed=1)
    await settled(second, alice, await second.runs.create(alice, session.session_id, 1, TINY_MODEL, spec, {}))
    assert [await step(second, f"{session.session_id}:train:1", seq) for seq in (1, 3, 5)] == killed


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
