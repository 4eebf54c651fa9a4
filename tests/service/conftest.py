"""The real service floor on a real engine process and a tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tuft.app import open_store, start_engine
from tuft.config import load_config
from tuft.engine.worker import EngineProcess
from tuft.records import Session, Tenant
from tuft.service.futures import Pending
from tuft.service.services import Services
from tuft.types import Failure, FutureResult

SETTINGS = """
[engine]
compiled_kernels = false

[limits]
max_rank = 8
max_runs_per_tenant = 3
max_resident_samplers = 1
seq_gap_timeout_s = 1.0
"""


@pytest.fixture(scope="session")
def config_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("service") / "tuft.toml"
    file.write_text(tiny_config(tiny_model, SETTINGS))
    return file


@pytest.fixture(scope="session")
def engine(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    process = start_engine(load_config(config_file, home=tmp_path_factory.mktemp("engine")))
    process.wait_ready(60)
    yield process
    process.close()


@pytest.fixture
async def services(
    config_file: Path, engine: EngineProcess, tmp_path: Path, database_url: str
) -> AsyncIterator[Services]:
    config = load_config(config_file, home=tmp_path, database_url=database_url)
    database = open_store(config)
    running = Services(config, database, engine)
    await running.start()
    yield running
    await running.stop()
    database.close()


@pytest.fixture
def alice(services: Services) -> Tenant:
    return services.tenants.authenticate(services.tenants.create_key("alice"))


@pytest.fixture
def session(services: Services, alice: Tenant) -> Session:
    return services.sessions.create(alice, (), {}, "test", None)


Settled = Callable[[str], Awaitable[FutureResult | Failure]]


@pytest.fixture
def settled(services: Services, alice: Tenant) -> Settled:
    """``await settled(future_id)``: its result or failure."""

    async def wait(future_id: str) -> FutureResult | Failure:
        result = await services.futures.wait(alice, future_id, hold_s=30.0)
        assert not isinstance(result, Pending), "the future did not settle within 30 s"
        return result

    return wait
