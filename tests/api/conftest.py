"""The real application on a tiny real model: services, engine process and HTTP server, in this process's own loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from tests.api.calls import ALIAS, ALICE, BASE_MODEL, BOB, LIMIT_BYTES, SHARED_PROJECT, new_session, post, result
from tuft.api.http import create_app
from tuft.api.inflight import InFlight
from tuft.app import model_sources, open_store, start_engine
from tuft.config import Config
from tuft.connections import HttpServer
from tuft.engine.base import EngineSettings
from tuft.engine.worker import EngineProcess
from tuft.service.services import Services


@dataclass(frozen=True)
class Served:
    """A running server, and the clients of its two tenants."""

    url: str
    services: Services
    inflight: InFlight
    alice: httpx.Client
    bob: httpx.Client
    anyone: httpx.Client


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Config:
    return Config(
        home=tmp_path_factory.mktemp("api"),
        server={"long_poll_s": 0.2, "drain_timeout_s": 0.0},
        engine={"device": "cpu", "num_threads": 1, "compiled_kernels": False},
        limits={"max_request_bytes": LIMIT_BYTES, "max_num_samples": 4, "max_runs_per_tenant": 1000},
        base_models=[{"name": BASE_MODEL, "path": str(tiny_model), "aliases": [ALIAS], "precision": "float32"}],
        keys=[{"tenant": "alice", "key": ALICE}, {"tenant": "bob", "key": BOB}],
        projects=[
            {"project_id": SHARED_PROJECT, "tenants": ["alice", "bob"]},
            {"project_id": "bobs", "tenants": ["bob"]},
        ],
    )


@pytest.fixture(scope="session")
def server(config: Config) -> Iterator[Served]:
    engine = start_engine(config)
    try:
        engine.wait_ready(timeout_s=60)
        with serving(config, engine) as served:
            yield served
    finally:
        engine.close()


@pytest.fixture(scope="session")
def loading_server(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose engine has not loaded anything yet; it exchanges no keys for tokens."""
    plain = config.server.model_copy(update={"jwt_auth": False})
    early = config.model_copy(update={"home": tmp_path_factory.mktemp("early"), "server": plain})
    engine = EngineProcess(model_sources(early), EngineSettings())
    with serving(early, engine) as served:
        yield served


@contextmanager
def serving(
    config: Config, engine: EngineProcess, port: int = 0, around: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> Iterator[Served]:
    """The application, with ``around`` it what a test wants to see of its traffic."""
    database = open_store(config)
    services = Services(config, database, engine)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else answers take 40 ms
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    app = create_app(services)
    http = HttpServer(around(app), config)
    started = threading.Event()

    async def serve() -> None:
        await services.start()
        started.set()
        await http.serve(sockets=[listener])
        await services.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with (
            httpx.Client(base_url=url, headers={"X-API-Key": ALICE}, timeout=60) as alice,
            httpx.Client(base_url=url, headers={"X-API-Key": BOB}, timeout=60) as bob,
            httpx.Client(base_url=url, timeout=60) as anyone,
        ):
            yield Served(url, services, app.state.inflight, alice, bob, anyone)
    finally:
        http.should_exit = True
        thread.join()
        database.close()


@pytest.fixture
def session_id(server: Served) -> Iterator[str]:
    """A session of alice's, which ends with the test and takes its runs along."""
    session_id = new_session(server.alice)
    yield session_id
    server.alice.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})


@pytest.fixture
def run_id(server: Served, session_id: str) -> str:
    """A run of alice's that is ready for its first operation."""
    submitted = post(
        server.alice,
        "create_model",
        session_id=session_id,
        model_seq_id=0,
        base_model=BASE_MODEL,
        lora_config={"rank": 4, "seed": 1},
        user_metadata={"purpose": "tests", "number": 1},
    )
    return str(result(server.alice, submitted)["model_id"])


@pytest.fixture
def sampler_id(server: Served, session_id: str) -> str:
    """A sampling session of alice's on the base model."""
    response = post(
        server.alice,
        "create_sampling_session",
        session_id=session_id,
        sampling_session_seq_id=900,
        base_model=BASE_MODEL,
    )
    return str(response.json()["sampling_session_id"])
