"""The database: SQLite by default, PostgreSQL by a URL, brought to the newest schema when opened."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Row, Select, Table, collate, func, insert, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from tuft.errors import ConfigError, StorageError
from tuft.store.claims import Claim, claim_on
from tuft.store.connecting import make_engine, shown, sqlite_url
from tuft.store.refusals import MEND_SQLITE, detail, is_damage, reason, refusal, unstorable
from tuft.store.schema import alone, newest_revision, revision_of, upgrade

__all__ = ["Database", "open_database", "sqlite_url"]


_POSTGRES_COLLATION = "und-x-icu"


class Database:
    """What the classes of this floor read and write rows with. All of it raises StorageError when the database refuses.

    The calls are synchronous and short (a point read or a few rows written); the service makes them from its event
    loop.
    """

    def __init__(self, engine: Engine, claim: Claim) -> None:
        self.engine = engine
        self._claim = claim
        # one statement needs no transaction: one round trip instead of three
        on_postgres = engine.dialect.name == "postgresql"
        self._reading = engine.execution_options(isolation_level="AUTOCOMMIT") if on_postgres else engine

    def close(self) -> None:
        self.engine.dispose()
        self._claim.release()

    @property
    def is_lost(self) -> bool:
        """Another server has the database by now: this one must end."""
        return self._claim.is_lost

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Committed at its end, or not at all. An IntegrityError passes through: the caller knows what it means. Raises
        InvalidInput for a text or a number that no database keeps."""
        with _refusals(), self.engine.begin() as connection:
            yield connection

    def lower(self, texts: ColumnElement[Any]) -> ColumnElement[str]:
        """In every alphabet, as ``str.lower`` has it; a database's own rules may know ASCII alone."""
        on_postgres = self.engine.dialect.name == "postgresql"
        return func.lower(collate(texts, _POSTGRES_COLLATION) if on_postgres else texts)

    def first(self, query: Select[Any], **named: Any) -> Row[Any] | None:
        """``named``: values of the query's parameters."""
        with _refusals(), self._reading.connect() as connection:
            return connection.execute(query, named).first()

    def all(self, query: Select[Any]) -> list[Row[Any]]:
        with _refusals(), self._reading.connect() as connection:
            return list(connection.execute(query))

    def page(self, query: Select[Any], limit: int, offset: int) -> tuple[list[Row[Any]], int]:
        """One page and the number of all rows."""
        with self.transaction() as connection:
            total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
            return list(connection.execute(query.limit(limit).offset(offset))), total

    def insert(self, table: Table, **values: Any) -> None:
        with self.transaction() as connection:
            connection.execute(insert(table).values(**values))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        raise refusal(error) from error
    except (UnicodeEncodeError, OverflowError) as error:  # the driver's, before anything is sent
        raise unstorable(error) from error


def open_database(url: str, serving: str | None = None) -> Database:
    """Connect and migrate; with ``serving`` (``claims.describe_server``) also claim it, so that no other server opens
    it. Raises ConfigError for a URL that cannot be used and for a database that another server has, StorageError if the
    database refuses, is damaged, or has a schema that is newer than ours.
    """
    engine = make_engine(url)
    claim = claim_on(engine)
    try:
        with _words_for(engine):
            _prepare(engine, claim, serving)
    except BaseException:  # whatever it was: it goes on, and nothing stays claimed
        engine.dispose()
        claim.release()
        raise
    return Database(engine, claim)


def _prepare(engine: Engine, claim: Claim, serving: str | None) -> None:
    if serving is None:
        with engine.connect() as connection:
            if revision_of(connection) == newest_revision():
                return  # without a lock: a command beside a busy server
    with alone(engine) as connection:
        _check(connection, thoroughly=serving is not None)
        if serving is None:
            upgrade(connection, used_by=lambda: claim.taken_by(connection))
            return
        claim.take(connection, serving)
        upgrade(connection, used_by=lambda: None)
        claim.tell(connection, serving)


def _check(connection: Connection, thoroughly: bool) -> None:
    """Raises StorageError or ConfigError."""
    if connection.dialect.name == "postgresql":
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
        if encoding != "UTF8":
            raise ConfigError(f"database_url: the database has encoding {encoding}; make one with createdb -E UTF8")
        known = text("SELECT 1 FROM pg_collation WHERE collname = :name")
        if connection.execute(known, {"name": _POSTGRES_COLLATION}).first() is None:
            raise ConfigError("database_url: this PostgreSQL was built without ICU; TuFT needs one that has it")
    elif thoroughly and (found := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()) != "ok":
        raise StorageError(f"database {shown(connection.engine)} is damaged ({found}): {MEND_SQLITE}")


@contextmanager
def _words_for(engine: Engine) -> Iterator[None]:
    """What goes wrong while a database is opened, in words for the operator."""
    try:
        yield
    except SQLAlchemyError as error:
        remedy = f" {MEND_SQLITE}" if is_damage(error) else ""
        words = f"{reason(error)} ({detail(error)})"
        raise StorageError(f"database {shown(engine)} cannot be opened: {words}.{remedy}") from error
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"database {shown(engine)} cannot be opened: {error}") from error
