"""Databases as they are opened and used: the same on SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import column, func, insert, select, table
from sqlalchemy.exc import IntegrityError

from tuft.errors import ConfigError, InvalidInput, StorageError
from tuft.records import now
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.tables import audit_log, metadata, tenants


def test_the_migrations_lead_to_the_tables(empty_database_url: str) -> None:
    database = open_database(empty_database_url)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_opening_twice_changes_nothing(empty_database_url: str) -> None:
    for _ in range(2):
        open_database(empty_database_url).close()


def test_sqlite_runs_in_wal_mode(tmp_path: Path) -> None:
    database = open_database(sqlite_url(tmp_path))
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000
    database.close()


@pytest.mark.parametrize("url", ["nonsense", "mysql://root:secret@localhost/tuft", "sqlite+aiosqlite:///x"])
def test_a_url_that_cannot_be_used_is_a_configuration_error_that_keeps_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match="database_url.*postgresql://.*sqlite:///") as caught:
        open_database(url)
    assert "secret" not in str(caught.value)


def test_a_database_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}/missing/directory/x.sqlite3")


def test_a_postgres_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(StorageError, match="postgresql://127.0.0.1:1/tuft cannot be opened: it cannot be reached") as e:
        open_database("postgresql://somebody:secret@127.0.0.1:1/tuft")
    assert "secret" not in str(e.value)


def test_a_postgres_database_that_does_not_exist_is_named_with_the_remedy(postgres_server: str) -> None:
    url = f"{postgres_server.rpartition('/')[0]}/missing"
    with pytest.raises(StorageError, match="/missing cannot be opened: it does not exist; make it with createdb"):
        open_database(url)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    yield opened
    opened.close()


def add(database: Database, name: str) -> None:
    database.insert(tenants, tenant_id=f"tenant-{name}", name=name, created_at=now())


def count(database: Database) -> int:
    row = database.first(select(func.count()).select_from(tenants))
    assert row is not None
    return int(row[0])


def test_a_transaction_is_written_whole_or_not_at_all(database: Database) -> None:
    def add_twice() -> None:
        with database.transaction() as connection:
            for tenant_id in ("a", "b"):
                connection.execute(insert(tenants).values(tenant_id=tenant_id, name="same", created_at=now()))

    with pytest.raises(IntegrityError):
        add_twice()
    assert count(database) == 0
    add(database, "alice")
    assert count(database) == 1


def test_half_a_pair_of_surrogates_is_the_callers_error(database: Database) -> None:
    with pytest.raises(InvalidInput, match="such as a database keeps"):
        add(database, "half \ud800")
    with pytest.raises(InvalidInput, match="such as a database keeps"):
        database.first(select(tenants).where(tenants.c.name == "half \ud800"))
    add(database, "alice")


def test_a_nul_is_kept_or_the_callers_error(database: Database) -> None:
    """SQLite keeps it."""
    wanted = contextlib.nullcontext() if database.engine.dialect.name == "sqlite" else pytest.raises(InvalidInput)
    with wanted:
        add(database, "nul \0 within")
    with wanted:
        database.first(select(tenants).where(tenants.c.name == "nul \0 within"))
    add(database, "alice")


@pytest.mark.parametrize("text", ["nul \0 within", "half \ud800"])
def test_json_that_cannot_be_searched_is_not_kept(database: Database, text: str) -> None:
    add(database, "alice")
    for details in ({"key": [text]}, {text: 1}):
        with pytest.raises(InvalidInput, match="such as a database keeps"):
            database.insert(audit_log, tenant_id="tenant-alice", at=now(), event="x", details=details)


def test_a_number_that_no_database_keeps_is_the_callers_error(database: Database) -> None:
    with pytest.raises(InvalidInput):
        database.all(select(tenants).limit(2**70))
    add(database, "alice")


def test_an_error_tells_no_statement_and_no_value(database: Database) -> None:
    with pytest.raises(StorageError) as caught:
        database.all(select(column("secret")).select_from(table("nowhere")))
    assert "secret" not in str(caught.value)
    assert "SELECT" not in str(caught.value)
