"""A real `tuft launch` that is killed and started again, on one home and one port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

TUFT = Path(sys.executable).with_name("tuft")
_READY_TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Server:
    """``config``: TOML; the tiny model's if it names one. ``key`` belongs to the tenant 'default'."""

    def __init__(self, home: Path, config: str, **environment: str) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home / "server.log"
        home.mkdir(parents=True, exist_ok=True)
        (home / "tuft.toml").write_text(config)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TUFT_")}
        self._environment = {"TUFT_ENGINE__COMPILED_KERNELS": "false", **clean, **environment}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> str:
        return (self.home / "api_key").read_text().strip()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, wait: bool = True) -> None:
        command = [str(TUFT), "launch", "--port", str(self.port), "--home", str(self.home)]
        command += ["--config", str(self.home / "tuft.toml")]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not get ready:\n{self.log.read_text()[-4000:]}")

    def engine_pid(self) -> int | None:
        """None between two of them."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.pid)], capture_output=True, text=True, check=False
        )
        pids = [int(line.split()[0]) for line in listed.stdout.splitlines() if "tuft.engine.process" in line]
        return pids[0] if pids else None

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory is short."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_engine(self) -> bool:
        """False if there was none to kill."""
        pid = self.engine_pid()
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def stop(self) -> int:
        """SIGTERM, as an operator would; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)
