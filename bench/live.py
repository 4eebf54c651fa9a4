"""A real server in a process of its own, its tenants with the real SDK, and what its processes take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

import tinker
from tinker import types

from bench import kernels
from bench.workloads import BaseModel
from tuft.types import Datum, LoraSpec

_START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Server:
    url: str
    pid: int
    keys: tuple[str, ...]

    @property
    def engine_pid(self) -> int:
        """Its only child whose command line is the engine's."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and _parent(entry) == self.pid and b"tuft.engine.process" in _command(entry):
                return int(entry.name)
        raise ProcessLookupError(f"the server {self.pid} has no engine process")


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return -1


def _command(entry: Path) -> bytes:
    return (entry / "cmdline").read_bytes()


def peak_rss_bytes(pid: int) -> int:
    """The most memory that the process has ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, status
    return int(found.group(1)) * 1024


@contextmanager
def server_home(base: BaseModel, keys: Sequence[str] = ()) -> Iterator[Path]:
    """A home with its ``tuft.toml``: every default but ``base``, a tenant for each of ``keys``, kernels compiled."""
    cache = kernels.compiled()
    text = f'[[base_models]]\nname = "{base.name}"\npath = "{base.path}"\n'
    text += "".join(f'\n[[keys]]\ntenant = "tenant-{n}"\nkey = "{key}"\n' for n, key in enumerate(keys))
    with TemporaryDirectory(prefix="tuft-bench-") as name:
        home = Path(name)
        if cache is None:
            text += "\n[engine]\ncompiled_kernels = false\n"
        else:
            (home / "kernels").symlink_to(cache)
        (home / "tuft.toml").write_text(text)
        yield home


@contextmanager
def running_server(base: BaseModel, num_tenants: int) -> Iterator[Server]:
    """``tuft launch`` with every default and a key for each tenant, ready to compute; ended with the block."""
    keys = tuple(f"tml-bench-{n:04d}" for n in range(num_tenants))
    with server_home(base, keys) as home:
        command = [sys.executable, "-m", "tuft", "launch", "--port", "0", "--home", str(home)]
        command += ["--config", str(home / "tuft.toml")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TUFT_")}
        with (home / "server.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield Server(_wait_until_ready(process, home / "server.log"), process.pid, keys)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"base URL\s+(http://\S+)", log.read_text())
        try:
            if found and urlopen(f"{found.group(1)}/readyz", timeout=5).status == 200:
                return found.group(1)
        except (URLError, TimeoutError):
            pass
        time.sleep(0.05)
    raise RuntimeError(f"the server did not get ready:\n{log.read_text()}")


def training_client(server: Server, tenant: int, base: BaseModel, spec: LoraSpec) -> tinker.TrainingClient:
    os.environ["TINKER_TELEMETRY"] = "0"
    client = tinker.ServiceClient(base_url=server.url, api_key=server.keys[tenant])
    return client.create_lora_training_client(
        base.name,
        rank=spec.rank,
        seed=tenant,
        train_mlp=spec.train_mlp,
        train_attn=spec.train_attn,
        train_unembed=spec.train_unembed,
    ).result()


def sdk_data(data: Sequence[Datum]) -> list[types.Datum]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(datum.tokens_T.tolist()),
            loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in datum.loss_fn_inputs.items()},
        )
        for datum in data
    ]
