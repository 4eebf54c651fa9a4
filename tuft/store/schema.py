"""The database's schema, brought to the newest revision: in one transaction, by one process at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from tuft import __version__
from tuft.errors import StorageError
from tuft.store.connecting import SQLITE_BUSY_MS, shown, sqlite_file
from tuft.store.tables import metadata

MIGRATIONS = Path(__file__).parent / "migrations"
_WAIT_MS = 60_000
"""How long one process waits for another's migration."""
_LOCK_KEY = 0x74756674_00000002


def newest_revision() -> str:
    head = _scripts().get_current_head()
    assert head is not None
    return head


def revision_of(connection: Connection) -> str | None:
    """None for a database in which no schema was ever made."""
    return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def alone(engine: Engine) -> Iterator[Connection]:
    """A transaction beside which no other process is in here, and nobody else writes to a SQLite database."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            with _sqlite_writing(connection):
                yield connection
            return
        connection.execute(text(f"SET LOCAL lock_timeout = {_WAIT_MS}"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        yield connection
        connection.commit()


def upgrade(connection: Connection, used_by: Callable[[], str | None]) -> None:
    """To the newest revision, within the caller's transaction; ``used_by`` names a server that uses the schema as it
    is. Raises StorageError."""
    found, newest = revision_of(connection), newest_revision()
    if found == newest:
        return
    where = shown(connection.engine)
    _refuse_unknown(connection, found, newest, where)
    if (holder := used_by()) is not None:
        raise StorageError(
            f"database {where} has schema {found}, and TuFT {__version__} needs {newest}, but a server uses it as it "
            f"is: {holder}. Stop that server first"
        )
    if found is not None:
        _keep_copy(connection, found)
    command.upgrade(alembic_config(connection), newest)
    if connection.dialect.name == "sqlite" and (broken := connection.execute(text("PRAGMA foreign_key_check")).first()):
        raise StorageError(f"database {where}: rows of table {broken[0]} refer to rows that are not there")


def _refuse_unknown(connection: Connection, found: str | None, newest: str, where: str) -> None:
    if found is None:
        taken = sorted(set(metadata.tables) & set(inspect(connection).get_table_names()))
        if taken:
            raise StorageError(
                f"database {where} has tables of the same names ({', '.join(taken[:3])}), but no schema of TuFT: it is "
                "another program's, or damaged. Give an empty one in database_url, or restore a backup"
            )
    elif found not in {script.revision for script in _scripts().walk_revisions()}:
        raise StorageError(
            f"database {where} has schema {found}, which is newer than TuFT {__version__} knows ({newest}): a newer "
            "TuFT has used it. Install that one again, or restore a backup from before"
        )


def _keep_copy(connection: Connection, revision: str) -> None:
    """Schemas do not go back: the SQLite file as it was before, beside it."""
    file = sqlite_file(connection.engine)
    if file is None:
        return
    copy = file.with_name(f"{file.name}.schema-{revision}")
    partial = copy.with_name(copy.name + ".partial")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as before, closing(sqlite3.connect(partial)) as opened:
        before.backup(opened)
    partial.chmod(0o600)
    partial.replace(copy)


@contextmanager
def _sqlite_writing(connection: Connection) -> Iterator[None]:
    """From BEGIN IMMEDIATE to COMMIT, tables and all: the driver begins with the first row only. Tables are made anew
    under their rows' foreign keys, which are checked at the end instead."""
    connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
    connection.exec_driver_sql(f"PRAGMA busy_timeout={_WAIT_MS}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        connection.commit()
    finally:
        connection.rollback()
        connection.exec_driver_sql(f"PRAGMA busy_timeout={SQLITE_BUSY_MS}")
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        connection.rollback()


def alembic_config(connection: Connection) -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))
