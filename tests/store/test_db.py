from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tuft.errors import ConfigError, StorageError
from tuft.store.db import open_database, sqlite_url
from tuft.store.tables import metadata


def test_the_migrations_lead_to_the_tables(tmp_path: Path) -> None:
    database = open_database(sqlite_url(tmp_path))
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_opening_twice_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        open_database(sqlite_url(tmp_path)).close()


def test_sqlite_runs_in_wal_mode(tmp_path: Path) -> None:
    database = open_database(sqlite_url(tmp_path))
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    database.close()


def test_a_url_that_makes_no_sense_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="database_url"):
        open_database("nonsense")


def test_a_database_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_database(f"sqlite:///{tmp_path}/missing/directory/x.sqlite3")
