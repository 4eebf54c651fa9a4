"""The real application on a tiny real model: services, engine process and HTTP server, in this process's own loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tests.models.tiny import make_tiny_model

from tuft.api.http import create_app
from tuft.app import model_sources, open_catalog
from tuft.config import Config
from tuft.engine.base import EngineSettings
from tuft.engine.worker import EngineProcess
from tuft.service.services import Services

BASE_MODEL = "tests/tiny-llama"
ALIAS = "tiny-llama"
ALICE, BOB = "tml-alice", "tml-bob"
LIMIT_BYTES = 2**20


@dataclass(frozen=True)
class Served:
    """A running server, and the clients of its two tenants."""

    url: str
    services: Services
    alice: httpx.Client
    bob: httpx.Client
    anyone: httpx.Client


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("api")
    model = make_tiny_model("llama", folder / "model")
    return Config(
        home=folder / "home",
        server={"long_poll_s": 0.2, "drain_timeout_s": 0.0},
        engine={"device": "cpu", "num_threads": 1},
        limits={"max_request_bytes": LIMIT_BYTES, "max_num_samples": 4},
        base_models=[{"name": BASE_MODEL, "path": str(model), "aliases": [ALIAS], "precision": "float32"}],
        keys=[{"tenant": "alice", "key": ALICE}, {"tenant": "bob", "key": BOB}],
    )


@pytest.fixture(scope="session")
def server(config: Config) -> Iterator[Served]:
    engine = EngineProcess(model_sources(config), EngineSettings(**config.engine.model_dump()))
    engine.start()
    try:
        engine.wait_ready()
        with serving(config, engine) as served:
            yield served
    finally:
        engine.close()


@pytest.fixture(scope="session")
def loading_server(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose engine has not loaded anything yet."""
    early = config.model_copy(update={"home": tmp_path_factory.mktemp("early")})
    engine = EngineProcess(model_sources(early), EngineSettings(**early.engine.model_dump()))
    with serving(early, engine) as served:
        yield served


@contextmanager
def serving(config: Config, engine: EngineProcess) -> Iterator[Served]:
    catalog = open_catalog(config)
    services = Services(config, catalog, engine)
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(create_app(services), log_config=None, access_log=False, lifespan="off"))
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
            yield Served(url, services, alice, bob, anyone)
    finally:
        http.should_exit = True
        thread.join()
        catalog.close()


def post(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    return client.post(f"/api/v1/{route}", json=fields)


def settled(client: httpx.Client, request_id: str, **headers: str) -> httpx.Response:
    """Poll as the SDK does, until the future is settled."""
    while True:
        response = client.post("/api/v1/retrieve_future", json={"request_id": request_id}, headers=headers)
        if response.status_code != 408:
            return response


def result(client: httpx.Client, submitted: httpx.Response) -> dict[str, Any]:
    assert submitted.status_code == 200, submitted.text
    response = settled(client, submitted.json()["request_id"])
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def new_session(client: httpx.Client) -> str:
    return str(post(client, "create_session", tags=[], sdk_version="0").json()["session_id"])


@pytest.fixture
def session_id(server: Served) -> str:
    """A session of alice's."""
    return new_session(server.alice)


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
        server.alice, "create_sampling_session", session_id=session_id, sampling_session_seq_id=0, base_model=BASE_MODEL
    )
    return str(response.json()["sampling_session_id"])


Tokens = Callable[[int], list[int]]


def cross_entropy(tokens: list[int], **more: Any) -> dict[str, Any]:
    """A forward_backward payload as old SDKs send it: each token is to predict the next."""
    inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [len(tokens) - 1]}}
    datum = {"model_input": {"chunks": [{"tokens": tokens[:-1]}]}, "loss_fn_inputs": inputs}
    return {"data": [datum], "loss_fn": "cross_entropy", **more}


def proto_body(run_id: str, seq_id: int, data: list[Any], *, forward_only: bool = False) -> bytes:
    """The same as the newest SDK sends it; ``data`` are its own datums."""
    import tinker
    from tinker.proto.request_conv import forward_backward_request_to_proto

    request = tinker.types.ForwardBackwardRequest(
        forward_backward_input=tinker.types.ForwardBackwardInput(data=data, loss_fn="cross_entropy"),
        model_id=run_id,
        seq_id=seq_id,
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return bytes(message.SerializeToString())


def tokenizer_folder(home: Path) -> Path:
    return home / "tokenizers" / BASE_MODEL.replace("/", "--")
