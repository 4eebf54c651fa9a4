"""`make demo`: start a server, fine-tune the embedded model on the shipped chats, show the effect, stop the server.

    python examples/chat_sft/demo.py [--out out/chat_sft] [any option of chat_sft.py]

Everything it starts it also ends, on success, failure and Ctrl-C alike. The exit code is that of chat_sft.py.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import chat_sft
from settings import parse_settings

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 45.0

# Measured (docs/guides/chat-sft.md): a model this small takes ten times the 1e-4 that suits big ones, small batches
# give it more updates for the same tokens, and after two epochs the held-out NLL no longer falls.
DEMO_OPTIONS = ["--dataset", "lighthouse", "--rank", "8", "--learning-rate", "1e-3", "--epochs", "2",
                "--batch-size", "4", "--eval-every", "21"]  # fmt: skip


class DemoFailed(Exception):
    """The server could not be brought up; the text says why."""


def main(arguments: Sequence[str]) -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _exit_on_signal)  # so that `finally` stops the server then, too
    api_key = f"tml-{secrets.token_urlsafe(24)}"
    options = ["--api-key", api_key, *DEMO_OPTIONS, *arguments]
    home = parse_settings(options).out / "home"
    print("TuFT demo: fine-tuning the embedded model on the chats shipped with the example, without any network.")
    try:
        with running_server(home, api_key) as base_url:
            exit_code = chat_sft.main([*options, "--base-url", base_url])
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    if exit_code == 0:
        adapter = keep_adapter(home)
        print(f"Adapter    {adapter} (PEFT's format); `tuft launch --home {home}` serves it again")
    return exit_code


def keep_adapter(home: Path) -> Path:
    """Copy the newest sampler weights out of the server's home, as `peft.PeftModel.from_pretrained` reads them."""
    saved = [
        config.parent
        for config in home.glob("checkpoints/*/*/*/adapter_config.json")
        if not (config.parent / "optimizer.safetensors").exists()
    ]
    newest = max(saved, key=lambda directory: directory.stat().st_mtime)
    adapter = home.parent / "adapter"
    adapter.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(newest / name, adapter / name)
    return adapter


@contextmanager
def running_server(home: Path, api_key: str) -> Iterator[str]:
    """`tuft launch` on a free port, ready for work; stopped on the way out. Yields its base URL."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    log_path = home / "server.log"
    with log_path.open("wb") as log:
        # A session of its own: Ctrl-C in the terminal then reaches the training alone, which still has to save.
        server = subprocess.Popen(
            [sys.executable, "-m", "tuft", "launch", "--port", str(port), "--home", str(home)],
            env={**os.environ, "TUFT_API_KEY": api_key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        print(f"Starting a server on {base_url}; the model loads, and the first time in {home} CPU kernels are")
        print("compiled, which takes about a minute ...", flush=True)
        started_s = time.monotonic()
        wait_ready(base_url, server, log_path)
        print(f"Ready after {time.monotonic() - started_s:.0f} s", flush=True)
        yield base_url
    finally:
        stop(server)
        print("Server stopped", flush=True)


def wait_ready(base_url: str, server: subprocess.Popen[bytes], log_path: Path) -> None:
    """Poll /readyz until it answers 200. Raises DemoFailed with the server's own words."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise DemoFailed(f"the server ended with exit code {server.returncode}:\n{_tail(log_path)}")
        try:
            with urllib.request.urlopen(f"{base_url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.25)  # not listening yet, or 503: still loading
    raise DemoFailed(f"the server was not ready within {READY_TIMEOUT_S:.0f} s:\n{_tail(log_path)}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, on which the server ends its work; then, or when that takes too long, nothing of its session is left."""
    try:
        server.terminate()
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print("The server does not stop by itself; killing it", file=sys.stderr)
    finally:  # also on a second Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log_path: Path, num_chars: int = 2000) -> str:
    return log_path.read_text(encoding="utf-8", errors="replace")[-num_chars:].strip()


def _exit_on_signal(signum: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
