"""A PostgreSQL server of its own for the tests, on loopback and a free port, gone at the end:

    python -m tests.postgres make test         # runs the command with TUFT_TEST_POSTGRES set

Tests take the server of TUFT_TEST_POSTGRES; without it each process of pytest starts one, if PostgreSQL is installed.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

VARIABLE = "TUFT_TEST_POSTGRES"
_DEBIAN = Path("/usr/lib/postgresql")
_SUPERUSER = "tuft"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    # tests kill servers, not machines
    "fsync": "off",
    "full_page_writes": "off",
}


# Whoever is killed closes the pipe that the server's shell reads; it becomes the server itself.
_ENDS_WITH_US = 'exec 3<&0; ((cat <&3 > /dev/null; kill -QUIT $$) 2> /dev/null &); exec "$0" "$@" < /dev/null 3<&-'


@functools.cache
def programs() -> Path | None:
    """The directory of initdb and postgres; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None and (Path(found).resolve().parent / "postgres").exists():
        return Path(found).resolve().parent
    versions = sorted(_DEBIAN.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


class Postgres:
    """One server in ``directory``. PostgreSQL refuses root, for whom the user ``postgres`` of the package runs it."""

    def __init__(self, directory: Path) -> None:
        found = programs()
        assert found is not None, "PostgreSQL is not installed: apt-get install postgresql"
        self._programs = found
        self.directory = directory
        self._data = directory / "data"
        self._log = directory / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        own(directory)
        self._run("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--no-locale", f"--username={_SUPERUSER}")

    @property
    def url(self) -> str:
        return f"postgresql://{_SUPERUSER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = {"port": str(self.port), **_SETTINGS}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", _ENDS_WITH_US, self._programs / "postgres", "-D", self._data, *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,  # Ctrl-C ends the tests first
                **_as_user(),
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL did not start:\n{self._log.read_text()}") from None
                time.sleep(0.05)
            else:
                return

    def stop(self, mode: str = "fast") -> None:
        """``immediate`` is a crash: what connections do is cut off, and the next start recovers."""
        if self._process is not None:
            self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")
            self._process.communicate(timeout=60)
            self._process = None

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._data), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **_as_user())
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="tuft-postgres-", ignore_cleanup_errors=True) as directory:
        server = Postgres(Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")


@contextmanager
def new_database(server_url: str, template: str = "template0") -> Iterator[str]:
    """The URL of a database on that server, dropped at the end with whoever is connected to it."""
    name = f"tuft_{uuid4().hex[:12]}"
    execute(server_url, f"CREATE DATABASE {name} TEMPLATE {template} ENCODING 'UTF8'")
    try:
        yield f"{server_url.rpartition('/')[0]}/{name}"
    finally:
        execute(server_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def own(directory: Path) -> None:
    """It is the server's."""
    if os.geteuid() == 0:
        shutil.chown(directory, "postgres", "postgres")


def _as_user() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(command: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with us
    with running() as server:
        return subprocess.run(command, check=False, env={**os.environ, VARIABLE: server.url}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
