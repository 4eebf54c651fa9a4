"""From a database URL to connections: SQLite in WAL mode, PostgreSQL through psycopg."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from tuft.errors import ConfigError

SQLITE_BUSY_MS = 5_000
"""How long a statement waits for another process's: `tuft key create` beside the server takes milliseconds."""
_ALLOWED = "must be postgresql://USER:PASSWORD@HOST:PORT/NAME or sqlite:////PATH"
_POSTGRES_NAMES = ("postgresql", "postgres", "postgresql+psycopg")
_POSTGRES_CONNECT = {
    "application_name": "tuft",
    "connect_timeout": 5,
    # a host that is gone is noticed, and its connections end
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_POSTGRES_SETTINGS = (
    "SELECT set_config('lock_timeout', '10s', false), set_config('statement_timeout', '60s', false), "
    "set_config('idle_in_transaction_session_timeout', '60s', false)"
)


def sqlite_url(home: Path) -> str:
    return f"sqlite:///{home / 'tuft.sqlite3'}"


def make_engine(url: str) -> Engine:
    """Connects to nothing yet. Raises ConfigError, which never repeats the URL: it holds a password."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(f"database_url: it is no URL; {_ALLOWED}") from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        engine = create_engine(parsed, hide_parameters=True, json_serializer=_json)
        event.listen(engine, "connect", _configure_sqlite)
        return engine
    if parsed.drivername in _POSTGRES_NAMES:
        return _postgres_engine(parsed)
    raise ConfigError(f"database_url: got {parsed.drivername}://...; {_ALLOWED}")


def sqlite_file(engine: Engine) -> Path | None:
    """None for PostgreSQL, and for a database in memory."""
    name = engine.url.database
    if engine.dialect.name != "sqlite" or not name or name == ":memory:":
        return None
    return Path(name.removeprefix("file:")).absolute()


def shown(engine: Engine) -> str:
    """The database as messages to the operator name it, without its password."""
    file = sqlite_file(engine)
    if file is not None or engine.dialect.name == "sqlite":
        return str(file or "in memory")
    url = engine.url  # its query may hold a password too
    return f"postgresql://{url.host or 'localhost'}:{url.port or 5432}/{url.database}"


def _postgres_engine(url: URL) -> Engine:
    arguments = {name: value for name, value in _POSTGRES_CONNECT.items() if name not in url.query}
    try:
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            json_serializer=_json,
            pool_pre_ping=True,  # PostgreSQL may have been started anew since the connection was used last
            pool_timeout=10,
            connect_args=arguments,
        )
    except ImportError as error:
        raise ConfigError(f"database_url: PostgreSQL needs psycopg: pip install 'tuft[postgres]' ({error})") from error
    event.listen(engine, "connect", _configure_postgres)
    return engine


def _json(value: Any) -> str:
    """PostgreSQL keeps JSON with a NUL or half a surrogate pair, and then fails to read in it."""
    written = json.dumps(value, ensure_ascii=False)
    written.encode()
    for text in _texts(value):
        if (where := text.find("\0")) >= 0:
            raise UnicodeEncodeError("utf-8", text, where, where + 1, "a NUL character")
    return written


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")  # `tuft key create` writes while the server reads
    cursor.execute("PRAGMA synchronous=FULL")  # what was acknowledged outlives a power cut, too
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
    connection.create_function("lower", 1, _lower, deterministic=True)  # its own knows ASCII alone


def _lower(text: str | None) -> str | None:
    return None if text is None else text.lower()


def _configure_postgres(connection: Any, _record: Any) -> None:
    with connection.transaction():
        connection.execute(_POSTGRES_SETTINGS)
