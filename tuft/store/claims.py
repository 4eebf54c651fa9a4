"""One server a database: whoever serves it holds a claim, and the next one is told who that is.

A claim ends with its server, however that ends. On SQLite it is a lock on a file beside the database. On PostgreSQL it
is a shared advisory lock of *every* connection of the server, and a token in table ``server``: the lock cannot be
taken exclusively while a single connection lives; and when PostgreSQL was started anew and another server was faster,
the token is no longer ours, so that no new connection of this server comes about. No moment is left in which two
write.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, Protocol

from sqlalchemy import Connection, Engine, delete, event, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from tuft import __version__
from tuft.errors import ConfigError, StorageError
from tuft.records import now
from tuft.store.connecting import sqlite_file
from tuft.store.tables import server

_LOCK_KEY = 0x74756674_00000001  # "tuft", and a number
_PATIENCE_S = 1.0  # a command looks whether the lock is free for an instant


class Claim(Protocol):
    """Raises SQLAlchemyError or OSError when database or disk refuses."""

    is_lost: bool
    """Another server has the database by now: this one must end."""

    def take(self, connection: Connection, description: str) -> None:
        """Once, on the only connection that there is yet. Raises ConfigError, which names who has it."""

    def tell(self, connection: Connection, description: str) -> None:
        """Write down who has it; the schema is the newest by now."""

    def taken_by(self, connection: Connection) -> str | None:
        """Who has it, in words; None if nobody does. Not asked by whoever has it."""

    def release(self) -> None: ...


def claim_on(engine: Engine) -> Claim:
    if engine.dialect.name == "postgresql":
        return _AdvisoryClaim(engine)
    file = sqlite_file(engine)
    return _Unclaimed() if file is None else _FileClaim(file)


def describe_server(home: Path) -> str:
    """This process as the next server is told of it."""
    since = now().isoformat(timespec="seconds")
    return f"process {os.getpid()} on host {socket.gethostname()}, home {home}, TuFT {__version__}, since {since}"


class _Unclaimed:
    """A database in memory is nobody else's."""

    is_lost = False

    def take(self, connection: Connection, description: str) -> None:
        pass

    def tell(self, connection: Connection, description: str) -> None:
        pass

    def taken_by(self, connection: Connection) -> str | None:  # noqa: ARG002
        return None

    def release(self) -> None:
        pass


class _FileClaim:
    is_lost = False

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._of_home = database.with_name("server.lock")  # all that servers up to 0.1.0 lock
        self._file: IO[str] | None = None

    def take(self, connection: Connection, description: str) -> None:  # noqa: ARG002
        file = self._path.open("a+")
        if not _has_locked(file, patience_s=_PATIENCE_S):
            file.close()
            raise _in_use(self._path.read_text())
        self._file = file
        file.truncate(0)
        file.write(description)
        file.flush()

    def tell(self, connection: Connection, description: str) -> None:
        pass

    def taken_by(self, connection: Connection) -> str | None:  # noqa: ARG002
        for path in (self._path, self._of_home):
            if path.exists():
                with path.open("a") as file:
                    if not _has_locked(file, patience_s=0.0):
                        return path.read_text()
        return None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


class _AdvisoryClaim:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._token = token_hex(16)
        self.is_lost = False

    def take(self, connection: Connection, description: str) -> None:  # noqa: ARG002
        deadline = time.monotonic() + _PATIENCE_S
        while not _call(connection, "pg_try_advisory_lock"):
            if time.monotonic() > deadline:
                raise _in_use(self.taken_by(connection) or "another server")
            time.sleep(0.05)
        _call(connection, "pg_try_advisory_lock_shared")
        _call(connection, "pg_advisory_unlock")

    def tell(self, connection: Connection, description: str) -> None:
        connection.execute(delete(server))
        connection.execute(insert(server).values(token=self._token, description=description))
        event.listen(self._engine, "connect", self._join)

    def taken_by(self, connection: Connection) -> str | None:
        high, low = divmod(_LOCK_KEY, 2**32)
        if connection.execute(_HELD, {"high": high, "low": low}).first() is None:
            return None
        try:
            with connection.begin_nested():
                found: str | None = connection.execute(select(server.c.description)).scalar()
        except SQLAlchemyError:  # a schema without that table: another version's
            found = None
        return found or "another server"

    def release(self) -> None:
        """Each connection has its share, and they end with the pool."""

    def _join(self, connection: Any, _record: Any) -> None:
        """A new connection of this server. Raises StorageError if the database is another's by now."""
        with connection.transaction():
            shares = connection.execute("SELECT pg_try_advisory_lock_shared(%s)", (_LOCK_KEY,)).fetchone()[0]
            row = connection.execute("SELECT token, description FROM server").fetchone()
        if not shares or row is None or row[0] != self._token:
            connection.close()
            self.is_lost = True
            raise StorageError("the database has been taken over by another server; this one must end")


_HELD = text(
    "SELECT 1 FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database "
    "WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND classid = :high AND objid = :low "
    "AND datname = current_database()"
)


def _call(connection: Connection, function: str) -> bool:
    return bool(connection.execute(text(f"SELECT {function}(:key)"), {"key": _LOCK_KEY}).scalar())


def _has_locked(file: IO[str], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _in_use(holder: str) -> ConfigError:
    return ConfigError(
        f"the database is in use by another server: {holder}. A database serves one home: stop that server, or give "
        "this one another database_url"
    )
