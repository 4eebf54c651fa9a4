"""The composition root: configuration in, a running server out."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tuft import garbage
from tuft.api.http import create_app
from tuft.config import ALL_SCOPES, Config
from tuft.connections import HttpServer
from tuft.embedded import EMBEDDED_ALIASES, EMBEDDED_NAME, find_embedded
from tuft.engine.base import BaseModelSource, EngineSettings
from tuft.engine.worker import EngineProcess
from tuft.errors import ConfigError, StorageError
from tuft.records import ApiKey
from tuft.service.services import Services
from tuft.service.tenants import DEFAULT_TENANT, Tenants, key_id_of
from tuft.store.claims import describe_server
from tuft.store.db import Database, open_database, sqlite_url
from tuft.types import BaseModelInfo

_LOOK_INTERVAL_S = 1.0


def prepare_home(home: Path) -> None:
    """Make the home if it is missing, readable by its owner alone. Raises StorageError."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        (home / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"home {home} cannot be used: {error.strerror}; choose another with --home") from error


def open_store(config: Config, serving: str | None = None) -> Database:
    """The home's database, brought to the newest schema; safe beside a running server. ``serving`` is the server's own:
    it describes it to the next one, which is refused."""
    prepare_home(config.home)
    url = sqlite_url(config.home) if config.database_url is None else config.database_url.get_secret_value()
    return open_database(url, serving)


def model_sources(config: Config) -> list[BaseModelSource]:
    """The configured base models; without any, the embedded one. Raises ModelError if that is not installed."""
    tokenizers = config.home / "tokenizers"
    if not config.base_models:
        return [
            BaseModelSource(
                name=EMBEDDED_NAME,
                path=str(find_embedded()),
                tokenizer_dir=str(tokenizers / EMBEDDED_NAME.replace("/", "--")),
                aliases=EMBEDDED_ALIASES,
            )
        ]
    return [
        BaseModelSource(
            name=model.name,
            path=model.path or model.name,
            tokenizer_dir=str(tokenizers / model.name.replace("/", "--")),
            aliases=model.aliases,
            max_context_tokens=model.max_context_tokens,
            precision=model.precision,
        )
        for model in config.base_models
    ]


def start_engine(config: Config) -> EngineProcess:
    """The engine's process, loading; ``wait_ready`` tells when it can compute."""
    kernel_cache = str(config.home / "kernels") if config.engine.compiled_kernels else None
    options = config.engine.model_dump(exclude={"compiled_kernels", "micro_batch_tokens", "run_memory_gib"})
    pass_tokens = config.engine.micro_batch_tokens or 0
    settings = EngineSettings(**options, micro_batch_tokens=pass_tokens, kernel_cache=kernel_cache)
    engine = EngineProcess(model_sources(config), settings)
    engine.start()
    return engine


def ensure_first_key(config: Config, tenants: Tenants) -> tuple[str | None, bool]:
    """A key to show at launch, and whether it was made just now.

    The first launch without any key makes one for the default tenant and keeps it in ``<home>/api_key``, readable by
    the owner alone; later launches show that one as long as the server still knows it.
    """
    file = config.home / "api_key"
    if config.api_key is not None:
        return config.api_key.get_secret_value(), False
    if file.exists() and tenants.knows(kept := file.read_text().strip()):
        return kept, False
    if config.keys or tenants.has_keys():
        return None, False
    key = tenants.create_key(DEFAULT_TENANT, scopes=ALL_SCOPES)
    _keep(file, key)
    return key, True


def keep_rotated(config: Config, rotated: ApiKey, key: str) -> None:
    """If ``<home>/api_key`` holds the key that was rotated, let it hold ``key``, the new one."""
    file = config.home / "api_key"
    if file.exists() and key_id_of(file.read_text().strip()) == rotated.key_id:
        _keep(file, key)


def _keep(file: Path, key: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(key + "\n")


class Audience(Protocol):
    """Who is told how the server is doing: the terminal."""

    def listening(self, url: str, key: str | None, key_is_new: bool) -> None: ...

    def ready(self, models: Sequence[BaseModelInfo]) -> None: ...

    def stopping(self) -> None: ...


def serve(config: Config, audience: Audience) -> None:
    """Run the server until SIGTERM or SIGINT. Raises ConfigError, ModelError or StorageError if it cannot start,
    EngineError or StorageError if it cannot go on: the engine is down for good, or another server has the database."""
    prepare_home(config.home)
    with _locked(config.home):
        listener = _listen(config)
        _raise_open_file_limit()
        database = open_store(config, serving=describe_server(config.home))
        engine = start_engine(config)
        try:
            asyncio.run(_serve(config, database, engine, listener, audience))
        finally:
            engine.close()
            database.close()
            listener.close()


async def _serve(
    config: Config,
    database: Database,
    engine: EngineProcess,
    listener: socket.socket,
    audience: Audience,
) -> None:
    services = Services(config, database, engine)
    await services.start()
    key, key_is_new = ensure_first_key(config, services.tenants)
    host, port = listener.getsockname()[:2]
    url = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}"  # noqa: S104
    server = HttpServer(create_app(services), config)
    garbage.settle()
    collecting = asyncio.create_task(garbage.serve())
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    watching = asyncio.create_task(_end_without(database, engine, stop))
    try:
        audience.listening(url, key, key_is_new)
        loading = asyncio.create_task(asyncio.to_thread(engine.wait_ready))
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()  # raises what the engine could not load
            audience.ready(services.base_models)
            await stopping
        if engine.error is not None:  # a supervisor starts us again, and the journal has what was acknowledged
            raise engine.error
        if database.is_lost:
            raise StorageError("the database has been taken over by another server; this one has ended")
        audience.stopping()
    finally:
        stopping.cancel()
        collecting.cancel()
        watching.cancel()
        await services.stop()
        server.should_exit = True
        await serving


async def _end_without(database: Database, engine: EngineProcess, stop: asyncio.Event) -> None:
    """End when another server has the database, as housekeeping, if nothing else, finds out; or when the engine is down
    for good."""
    while not database.is_lost and engine.error is None:  # noqa: ASYNC110 (both are told from other threads)
        await asyncio.sleep(_LOOK_INTERVAL_S)
    stop.set()


def _listen(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.server.host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only where the protocol is said; else the kernel keeps every answer for 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.server.host, config.server.port))
    except OSError as error:
        listener.close()
        where = f"{config.server.host}:{config.server.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}; --port 0 takes a free port") from error
    return listener


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One server a home: a second would take the first's runs for lost and its unfinished files for waste."""
    with (home / "server.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(f"home {home} is in use by another server: {file.read().strip()}") from None
        file.truncate(0)
        file.write(describe_server(home))
        file.flush()
        yield


def _raise_open_file_limit() -> None:
    """Every future being waited for holds a connection; the default soft limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
