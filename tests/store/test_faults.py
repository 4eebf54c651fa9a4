"""Databases that fail: each failure is a StorageError with its remedy, and the same open database works again when the
cause is gone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select

from tests import postgres
from tuft.errors import StorageError
from tuft.records import now
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.tables import tenants


def write(database: Database) -> None:
    name = token_hex(8)
    database.insert(tenants, tenant_id=name, name=name, created_at=now())


def write_much(database: Database) -> None:
    for _ in range(10_000):
        write(database)


def count(database: Database) -> int:
    row = database.first(select(func.count()).select_from(tenants))
    assert row is not None
    return int(row[0])


def set_up_connections(database: Database, statement: str) -> None:
    """From now on each connection begins with it."""

    def run(connection: Any, _record: Any) -> None:
        connection.execute(statement)
        if not isinstance(connection, sqlite3.Connection):
            connection.commit()

    database.engine.dispose()
    event.listen(database.engine, "connect", run)


@contextmanager
def small_disk(directory: Path, size: str = "2m") -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk needs root and the right to mount")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def fill(directory: Path) -> Path:
    """Until nothing is free."""
    file = directory / "ballast"
    with file.open("wb", buffering=0) as opened:
        for size in (2**16, 2**9, 1):
            try:
                while opened.write(b"\1" * size) == size:
                    pass
            except OSError:
                continue
    return file


# --- SQLite -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_forgiven(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        database = open_database(sqlite_url(disk), serving="me")
        write(database)
        ballast = fill(disk)
        with pytest.raises(StorageError, match="its disk is full; free some space"):
            write_much(database)
        before = count(database)
        with pytest.raises(StorageError, match="its disk is full; free some space"):
            write_much(database)
        ballast.unlink()
        after = count(database)
        assert after >= before
        write(database)
        assert count(database) == after + 1
        database.close()


def test_a_database_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    """As a quota of the file system would have it; needs no mount."""
    database = open_database(sqlite_url(tmp_path))
    set_up_connections(database, "PRAGMA max_page_count=1")  # SQLite takes it for the present size
    with pytest.raises(StorageError, match="its disk is full; free some space"):
        write_much(database)
    assert count(database) > 0
    database.close()


def test_a_database_that_may_not_be_written_is_still_read(tmp_path: Path) -> None:
    database = open_database(sqlite_url(tmp_path))
    write(database)
    set_up_connections(database, "PRAGMA query_only=ON")
    with pytest.raises(StorageError, match="it is read-only; make its file, directory and disk writable"):
        write(database)
    assert count(database) == 1
    database.close()


def test_a_database_on_a_read_only_disk_cannot_be_opened_to_serve(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        open_database(sqlite_url(disk)).close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(StorageError, match="cannot be opened"):
            open_database(sqlite_url(disk), serving="me")


def test_a_lock_of_another_process_is_said_and_forgiven(tmp_path: Path) -> None:
    database = open_database(sqlite_url(tmp_path))
    set_up_connections(database, "PRAGMA busy_timeout=20")
    with closing(sqlite3.connect(tmp_path / "tuft.sqlite3")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another process keeps it locked; end that one"):
            write(database)
        assert count(database) == 0  # readers go on
    write(database)
    assert count(database) == 1
    database.close()


@pytest.mark.parametrize("serving", [None, "me"])
def test_a_file_that_is_no_database_is_named_with_the_remedy(tmp_path: Path, serving: str | None) -> None:
    (tmp_path / "tuft.sqlite3").write_bytes(b"not a database " * 1000)
    with pytest.raises(StorageError, match=r"tuft\.sqlite3 cannot be opened: .*Restore a backup.*move it away"):
        open_database(sqlite_url(tmp_path), serving)


def filled(home: Path) -> Path:
    database = open_database(sqlite_url(home))
    for _ in range(500):
        write(database)
    database.close()
    return home / "tuft.sqlite3"


def test_a_file_with_damaged_pages_is_not_served(tmp_path: Path) -> None:
    file = filled(tmp_path)
    with file.open("r+b") as opened:
        for page in range(3, file.stat().st_size // 4096, 2):
            opened.seek(page * 4096)
            opened.write(os.urandom(200))
    with pytest.raises(StorageError, match=r"(damaged|cannot be opened).*Restore a backup"):
        open_database(sqlite_url(tmp_path), serving="me")


def test_a_file_that_was_cut_off_is_not_served(tmp_path: Path) -> None:
    file = filled(tmp_path)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(StorageError, match=r"(damaged|cannot be opened).*Restore a backup"):
        open_database(sqlite_url(tmp_path), serving="me")


def test_damage_that_comes_up_later_is_said(tmp_path: Path) -> None:
    file = filled(tmp_path)
    database = open_database(sqlite_url(tmp_path))
    os.truncate(file, file.stat().st_size // 2)
    database.engine.dispose()
    with pytest.raises(StorageError, match="damaged"):
        database.all(select(tenants))
    database.close()


def test_an_empty_file_is_an_empty_database(tmp_path: Path) -> None:
    (tmp_path / "tuft.sqlite3").touch()
    database = open_database(sqlite_url(tmp_path), serving="me")
    write(database)
    database.close()


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(own_postgres_url: str) -> Iterator[Database]:
    opened = open_database(own_postgres_url, serving="me")
    yield opened
    opened.close()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_postgres_is_said_while_it_lasts_and_forgiven(
    own_postgres: postgres.Postgres, database: Database, mode: str
) -> None:
    write(database)
    own_postgres.stop(mode)
    for _ in range(2):
        with pytest.raises(StorageError, match="it cannot be reached; is it running"):
            write(database)
        with pytest.raises(StorageError, match="it cannot be reached; is it running"):
            count(database)
    own_postgres.start()
    write(database)
    assert count(database) == 2


def test_a_restart_of_postgres_between_two_requests_is_not_noticed(
    own_postgres: postgres.Postgres, database: Database
) -> None:
    write(database)
    own_postgres.stop()
    own_postgres.start()
    write(database)
    assert count(database) == 2


def test_a_transaction_that_a_restart_cuts_off_is_not_written(
    own_postgres: postgres.Postgres, database: Database
) -> None:
    def write_twice() -> None:
        with database.transaction() as connection:
            connection.execute(insert(tenants).values(tenant_id="lost", name="lost", created_at=now()))
            own_postgres.stop("immediate")
            own_postgres.start()
            connection.execute(insert(tenants).values(tenant_id="lost-2", name="lost-2", created_at=now()))

    with pytest.raises(StorageError, match="the connection to it broke"):
        write_twice()
    assert count(database) == 0
    write(database)
    assert count(database) == 1


def test_a_lock_in_postgres_is_said_and_forgiven(own_postgres: postgres.Postgres, database: Database) -> None:
    set_up_connections(database, "SET lock_timeout = '20ms'")
    other = open_database(database.engine.url.render_as_string(hide_password=False))
    with other.transaction() as holding:
        holding.exec_driver_sql("LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StorageError, match="another transaction keeps it locked; end that one"):
            write(database)
    write(database)
    assert count(database) == 1
    other.close()


def test_a_read_only_postgres_is_said(database: Database) -> None:
    name = database.engine.url.database
    with database.transaction() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database.engine.dispose()
    with pytest.raises(StorageError, match="it is read-only: a standby, perhaps"):
        write(database)
    assert count(database) == 0


def test_a_postgres_without_free_connections_is_said_and_forgiven(database: Database) -> None:
    url = database.engine.url.render_as_string(hide_password=False).replace("+psycopg", "")
    postgres.execute(url, f"ALTER DATABASE {database.engine.url.database} CONNECTION LIMIT 0")
    postgres.execute(url, "CREATE ROLE plain LOGIN")
    plain = url.replace("tuft@", "plain@", 1)
    with pytest.raises(StorageError, match="too many connections"):
        open_database(plain)
    postgres.execute(url, "DROP ROLE plain")


def test_a_full_disk_of_postgres_is_said_and_forgiven(own_postgres: postgres.Postgres, tmp_path_factory: Any) -> None:
    with small_disk(own_postgres.directory / "small", "24m") as disk:
        postgres.own(disk)
        postgres.execute(own_postgres.url, f"CREATE TABLESPACE small LOCATION '{disk}'")
        postgres.execute(own_postgres.url, "CREATE DATABASE cramped TABLESPACE small TEMPLATE template0")
        database = open_database(f"{own_postgres.url.rpartition('/')[0]}/cramped")
        write(database)
        ballast = fill(disk)
        with pytest.raises(StorageError, match="its disk is full; free some space"):
            write_much(database)
        before = count(database)
        ballast.unlink()
        write(database)
        assert count(database) == before + 1
        database.close()
        postgres.execute(own_postgres.url, "DROP DATABASE cramped WITH (FORCE)")
        postgres.execute(own_postgres.url, "DROP TABLESPACE small")
