"""Schemas of every released version come to today's with all their rows; what cannot is refused with the remedy."""

from __future__ import annotations

import hashlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, select, text

from tests.store.released import AT, DIGESTS, ROWS, make_released
from tuft import __version__
from tuft.errors import StorageError
from tuft.records import Tenant
from tuft.store.catalog import Catalog
from tuft.store.connecting import make_engine
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.schema import MIGRATIONS, newest_revision
from tuft.store.tables import audit_log, ledger, metadata

NEW_DEFAULTS: dict[str, dict[str, Any]] = {
    "sessions": {"project_id": None, "heard_at": None},
    "runs": {"optimizer": "adamw", "key_number": 0},
    "checkpoints": {"optimizer": "adamw", "public": False, "saved_seq": None},
    "samplers": {"inflight_run_id": None, "num_joined": 0, "saved_seq": None},
    "tenants": {"suspended_at": None},
    "api_keys": {"name": "", "expires_at": None, "revoked_at": None, "last_used_at": None},
}
"""What rows of released versions have in the columns that are newer."""


MOVED = {"usage": "the ledger", "awaited_samples": "journaled futures, which an earlier server had none of"}
"""Tables of released versions that are gone, and what has taken their place."""


@contextmanager
def opened(url: str) -> Iterator[Database]:
    database = open_database(url)
    try:
        yield database
    finally:
        database.close()


def rows_of(database: Database, table_name: str) -> list[dict[str, Any]]:
    table = metadata.tables[table_name]
    return [dict(row._mapping) for row in database.all(select(table).order_by(*table.primary_key))]


@pytest.mark.parametrize("revision", sorted(DIGESTS))
def test_a_released_migration_is_never_edited(revision: str) -> None:
    (file,) = (MIGRATIONS / "versions").glob(f"{revision}_*.py")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[revision]


@pytest.mark.parametrize("revision", sorted(ROWS))
def test_every_row_of_a_released_version_is_kept(empty_database_url: str, revision: str) -> None:
    make_released(empty_database_url, revision)
    with opened(empty_database_url) as database:
        for name, rows in ROWS[revision].items():
            if name in MOVED:
                continue
            for row, before in zip(rows_of(database, name), rows, strict=True):
                newer = {key: value for key, value in NEW_DEFAULTS.get(name, {}).items() if key not in before}
                assert {column: row[column] for column in (*before, *newer)} == {**before, **newer}
        sums = [
            (row.session_id, row.hour, row.key_number, row.rate, row.quantity) for row in database.all(select(ledger))
        ]
        used = [(row["session_id"], row["hour"], 0, 0, row["quantity"]) for row in ROWS[revision].get("usage", [])]
        assert sorted(sums) == sorted(used)


@pytest.mark.parametrize("revision", sorted(ROWS))
def test_what_was_kept_is_read_by_todays_code(empty_database_url: str, revision: str) -> None:
    make_released(empty_database_url, revision)
    with opened(empty_database_url) as database:
        catalog = Catalog(database)
        tenant = Tenant("tenant-1", "Jörg")
        run = catalog.run(tenant, "s1:train:0")
        assert run is not None
        assert (run.created_at, run.spec.seed, run.user_metadata) == (AT, 2**40, {"purpose": "x"})
        assert [sampler.directory for sampler in catalog.samplers(tenant, "s1")] == [None, "d1"]
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": False})
            assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize("revision", sorted(ROWS))
def test_new_rows_are_written_beside_those_that_were_kept(empty_database_url: str, revision: str) -> None:
    """Numbers that the database itself gives out go on behind the last."""
    make_released(empty_database_url, revision)
    with opened(empty_database_url) as database:
        for _ in range(2):
            database.insert(audit_log, tenant_id="tenant-1", at=AT, event="x", details={})
        assert len(rows_of(database, "audit_log")) == len(ROWS[revision].get("audit_log", [])) + 2


@pytest.mark.parametrize("revision", sorted(ROWS))
def test_types_are_the_same_as_in_a_new_database(empty_postgres_url: str, postgres_url: str, revision: str) -> None:
    make_released(empty_postgres_url, revision)
    open_database(empty_postgres_url).close()
    assert columns_of(empty_postgres_url) == columns_of(postgres_url)


def columns_of(url: str) -> dict[str, list[str]]:
    found = MetaData()
    engine = make_engine(url)
    found.reflect(engine)
    engine.dispose()
    return {
        name: sorted(f"{column.name} {column.type!r} {column.nullable}" for column in table.columns)
        for name, table in found.tables.items()
    }


def test_the_sqlite_file_as_it_was_before_is_kept(tmp_path: Path) -> None:
    make_released(sqlite_url(tmp_path), "0002")
    open_database(sqlite_url(tmp_path)).close()
    copy = tmp_path / "tuft.sqlite3.schema-0002"
    assert copy.stat().st_mode & 0o077 == 0
    with closing(sqlite3.connect(copy)) as before:
        assert before.execute("SELECT version_num FROM alembic_version").fetchone() == ("0002",)
        assert before.execute("SELECT count(*) FROM usage").fetchone() == (2,)


def alter(url: str, statement: str) -> None:
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_a_newer_schema_is_refused_with_both_versions_and_the_remedy(empty_database_url: str) -> None:
    open_database(empty_database_url).close()
    alter(empty_database_url, "UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(StorageError) as caught:
        open_database(empty_database_url)
    for part in ("schema 0999", f"({newest_revision()})", f"TuFT {__version__}", "Install that one again", "backup"):
        assert part in str(caught.value)


def test_tables_of_another_program_are_left_alone(empty_database_url: str) -> None:
    alter(empty_database_url, "CREATE TABLE sessions (theirs INTEGER)")
    with pytest.raises(StorageError, match=r"tables of the same names \(sessions\)"):
        open_database(empty_database_url)
    alter(empty_database_url, "INSERT INTO sessions VALUES (1)")


def test_a_migration_that_fails_changes_nothing(empty_database_url: str) -> None:
    make_released(empty_database_url, "0002")
    alter(empty_database_url, "CREATE TABLE snapshots (in_the_way INTEGER)")
    with pytest.raises(StorageError, match="cannot be opened"):
        open_database(empty_database_url)
    alter(empty_database_url, "DROP TABLE snapshots")
    open_database(empty_database_url).close()


def open_in_a_process(url: str, then: str = "") -> subprocess.Popen[str]:
    code = f"from tuft.store.db import open_database; print(flush=True); open_database({url!r}); {then}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_many_processes_that_migrate_at_once_all_succeed(empty_database_url: str) -> None:
    make_released(empty_database_url, "0001")
    processes = [open_in_a_process(empty_database_url) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    with opened(empty_database_url) as database:
        assert len(rows_of(database, "runs")) == 1


def assert_whole(url: str, revision: str) -> None:
    with opened(url) as database:
        for name in set(ROWS[revision]) - set(MOVED):
            assert len(rows_of(database, name)) == len(ROWS[revision][name])


@pytest.mark.parametrize("delay_s", [0.02, 0.06, 0.12])
def test_a_process_killed_while_it_migrates_leaves_nothing_half_done(empty_database_url: str, delay_s: float) -> None:
    make_released(empty_database_url, "0001")
    process = open_in_a_process(empty_database_url, then="import time; time.sleep(60)")
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert_whole(empty_database_url, "0001")


def test_a_process_killed_between_two_tables_leaves_nothing_half_done(empty_postgres_url: str) -> None:
    make_released(empty_postgres_url, "0001")
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'samplers'::regclass"
    with psycopg.connect(empty_postgres_url) as reader, psycopg.connect(empty_postgres_url, autocommit=True) as watcher:
        reader.execute("SELECT * FROM samplers")  # nobody alters that table until this one has ended
        process = open_in_a_process(empty_postgres_url)
        deadline = time.monotonic() + 60
        while watcher.execute(waiting).fetchone() == (0,):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert_whole(empty_postgres_url, "0001")
