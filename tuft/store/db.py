"""The database: SQLite in WAL mode by default, any SQLAlchemy URL else, brought to the newest schema when opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy import Connection, Engine, Row, Select, Table, create_engine, event, func, insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from tuft.errors import ConfigError, StorageError

MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """What the classes of this floor read and write rows with. All of it raises StorageError when the database refuses.

    The calls are synchronous and short (a point read or a few rows written); the service makes them from its event
    loop.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Committed at its end, or not at all. An IntegrityError passes through: the caller knows what it means."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise StorageError(f"the database refused: {error}") from error

    def first(self, query: Select[Any]) -> Row[Any] | None:
        with self.transaction() as connection:
            return connection.execute(query).first()

    def all(self, query: Select[Any]) -> list[Row[Any]]:
        with self.transaction() as connection:
            return list(connection.execute(query))

    def page(self, query: Select[Any], limit: int, offset: int) -> tuple[list[Row[Any]], int]:
        """One page and the number of all rows."""
        with self.transaction() as connection:
            total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
            return list(connection.execute(query.limit(limit).offset(offset))), total

    def insert(self, table: Table, **values: Any) -> None:
        with self.transaction() as connection:
            connection.execute(insert(table).values(**values))


def open_database(url: str) -> Database:
    """Connect and migrate. Raises ConfigError for a URL that cannot be used, StorageError if the database refuses."""
    try:
        engine = create_engine(make_url(url))
    except (ArgumentError, ImportError) as error:
        raise ConfigError(f"database_url: {error}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
    try:
        _migrate(engine)
    except SQLAlchemyError as error:
        raise StorageError(f"database {engine.url!r} cannot be opened: {error}") from error
    return Database(engine)


def sqlite_url(home: Path) -> str:
    return f"sqlite:///{home / 'tuft.sqlite3'}"


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # `tuft key create` writes while the server reads
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.close()
    connection.create_function("lower", 1, _lower, deterministic=True)  # its own knows ASCII alone


def _lower(text: str | None) -> str | None:
    return None if text is None else text.lower()


def _migrate(engine: Engine) -> None:
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
