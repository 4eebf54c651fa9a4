"""Servers on a tiny model for several tenants, and what their processes hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from faults.server import Server
from tests.conftest import TINY_MODEL, tiny_config
from tests.models.tiny import make_tiny_model

MODEL = TINY_MODEL
_STALLS = Path(__file__).with_name("stalls")
KEY = "tml-faults-{:04d}"
"""Of the tenants, by their number."""


@contextmanager
def tiny_server(num_tenants: int = 1, options: str = "") -> Iterator[Server]:
    """A running server with a key for each tenant; ``options`` are further lines of its ``tuft.toml``."""
    with TemporaryDirectory(prefix="tuft-faults-") as name:
        text = tiny_config(make_tiny_model("qwen3", Path(name) / "model"), options)
        text += "".join(f'[[keys]]\ntenant = "tenant-{n}"\nkey = "{KEY.format(n)}"\n' for n in range(num_tenants))
        paths = f"{_STALLS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        watched = {"PYTHONPATH": paths, "FAULTS_STALLS": str(Path(name) / "stalls")}
        server = Server(Path(name) / "home", text, TUFT_ENGINE__NUM_THREADS="1", **watched)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def stalls_ms(server: Server) -> list[float]:
    """How long its event loop was held, each time that it was for more than 10 ms, by its own work."""
    file = server.home.parent / "stalls"
    return [float(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def rss_bytes(pid: int) -> int:
    """What the process has in memory now."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
