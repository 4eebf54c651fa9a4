"""What tests share: tiny real models, and real servers in processes of their own that are always ended."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from tests.databases import (  # noqa: F401  (fixtures)
    database_url,
    empty_database_url,
    empty_postgres_url,
    migrated_postgres,
    own_postgres,
    own_postgres_url,
    postgres_server,
    postgres_url,
)
from tests.models.tiny import make_tiny_model
from tuft.app import open_store
from tuft.config import load_config
from tuft.models.kernels.build import Build, directory_of
from tuft.service.services import open_tenants

KERNELS = Path(__file__).parents[1] / ".pytest_cache/kernels"
# numba itself would not see that a function which a kernel calls has changed
os.environ["NUMBA_CACHE_DIR"] = str(directory_of(KERNELS))
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # two such processes share two cores; what threads change is tested with several

TUFT = Path(sys.executable).with_name("tuft")
TINY_MODEL = "tiny/qwen3"
TEAM = "team"
"""A project of ``tiny_server``; its members are the tenants ``team-1`` and ``team-2``."""


@dataclass
class LiveServer:
    """A `tuft launch` that answers. ``key`` belongs to the tenant 'default'."""

    url: str
    key: str
    home: Path
    process: subprocess.Popen[str]
    log: Path

    def create_key(self, tenant: str) -> str:
        """What ``tuft key create`` does, while the server runs."""
        config = load_config(home=self.home)
        database = open_store(config)
        try:
            return open_tenants(config, database).create_key(tenant)
        finally:
            database.close()

    def stop(self) -> int:
        """SIGTERM, as an operator would; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


Launch = Callable[..., LiveServer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: else one worker would have them to itself when the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _no_client_outlives_its_module() -> Iterator[None]:
    """The SDK goes on with heartbeats to a server that is long gone, and with warnings of them in others' logs."""
    yield
    sdk = sys.modules.get("tinker.lib.internal_client_holder")
    loop = sdk and sdk._internal_client_holder_thread_singleton.loop_if_started()
    if loop:
        loop.call_soon_threadsafe(_end_heartbeats, loop)


def _end_heartbeats(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        if getattr(task.get_coro(), "__name__", "") == "_session_heartbeat":
            task.cancel()


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The cache of compiled kernels that the tests share, filled: a clean clone compiles them now, for a minute."""
    KERNELS.mkdir(parents=True, exist_ok=True)
    with (KERNELS.parent / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist has more processes
        build = Build(KERNELS, in_background=False)
        while not build.ready():
            time.sleep(0.1)
    return KERNELS


def with_kernels(home: Path, kernels: Path) -> Path:
    """A new home whose server has compiled kernels at once, as it has from its second start on."""
    home.mkdir(exist_ok=True)
    (home / "kernels").symlink_to(kernels)
    return home


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """``launch(home=..., config=..., env=...)``: a server on a free port, ready to compute."""
    servers: list[LiveServer] = []

    def start(home: Path | None = None, config: str | None = None, env: dict[str, str] | None = None) -> LiveServer:
        home = home or tmp_path_factory.mktemp("home")
        command = [str(TUFT), "launch", "--port", "0", "--home", str(home), "--verbose"]
        if config is not None:
            file = home / "tuft.toml"
            file.write_text(config)
            command += ["--config", str(file)]
        log = home / "server.log"
        # a new home would compile them
        has_kernels = {"TUFT_ENGINE__COMPILED_KERNELS": str((home / "kernels").exists()).lower()}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TUFT_")}
        with log.open("w") as opened:
            process = subprocess.Popen(
                command,
                stdout=opened,
                stderr=subprocess.STDOUT,
                text=True,
                env={**has_kernels, **environment, **(env or {})},
            )
        url = _wait_until_ready(process, log)
        key_file = home / "api_key"
        key = key_file.read_text().strip() if key_file.exists() else (env or {}).get("TUFT_API_KEY", "")
        servers.append(LiveServer(url, key, home, process, log))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + 60
    url = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if url is None and (found := re.search(r"base URL\s+(http://\S+)", log.read_text())):
            url = found.group(1)
        if url is not None:
            try:
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    return url
            except httpx.TransportError:
                pass
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the server did not get ready:\n{log.read_text()}")


def tiny_config(directory: Path, extra: str = "") -> str:
    """A configuration with one tiny model, computed in float32."""
    return f'''{extra}
[[base_models]]
name = "{TINY_MODEL}"
path = "{directory}"
aliases = ["tiny"]
precision = "float32"
'''


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random Qwen3 model with a real tokenizer."""
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="session")
def tiny_server(launch: Launch, tiny_model: Path) -> LiveServer:
    """One server on the tiny model for all tests that leave it as they found it."""
    team = f'[[projects]]\nproject_id = "{TEAM}"\ntenants = ["{TEAM}-1", "{TEAM}-2"]\n'
    return launch(config=tiny_config(tiny_model, team))


@pytest.fixture(scope="session")
def embedded_server(launch: Launch, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """One server on the embedded SmolLM2-135M-Instruct, with every default."""
    return launch(with_kernels(tmp_path_factory.mktemp("home"), kernels))
