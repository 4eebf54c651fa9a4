"""One server a database, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest
from sqlalchemy import select

from tests import postgres
from tests.store.released import make_released
from tuft.errors import ConfigError, StorageError
from tuft.records import now
from tuft.store.claims import claim_on, describe_server
from tuft.store.connecting import make_engine
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.schema import alone
from tuft.store.tables import tenants

FIRST, SECOND = (f"process {number} on host h, home /home/{number}" for number in (1, 2))


def use(database: Database) -> None:
    name = token_hex(8)
    database.insert(tenants, tenant_id=name, name=name, created_at=now())
    assert database.first(select(tenants).where(tenants.c.name == name)) is not None


def test_a_second_server_is_refused_and_told_who_is_the_first(database_url: str) -> None:
    first = open_database(database_url, serving=FIRST)
    for _ in range(2):
        with pytest.raises(ConfigError, match=FIRST):
            open_database(database_url, serving=SECOND)
    use(first)
    assert not first.is_lost
    first.close()
    open_database(database_url, serving=SECOND).close()


def test_a_command_beside_the_server_reads_and_writes(database_url: str) -> None:
    server = open_database(database_url, serving=FIRST)
    command = open_database(database_url)
    use(command)
    use(server)
    command.close()
    server.close()


def test_a_server_that_is_killed_leaves_the_database_to_the_next(database_url: str) -> None:
    code = f"""if True:
        from tuft.store.db import open_database
        import time
        database = open_database({database_url!r}, serving={FIRST!r})
        print("open", flush=True)
        time.sleep(60)"""
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match=FIRST):
        open_database(database_url, serving=SECOND)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    open_database(database_url, serving=SECOND).close()


def test_a_server_is_described_by_process_host_and_home(tmp_path: Path) -> None:
    described = describe_server(tmp_path)
    for part in (f"process {os.getpid()} ", f"host {socket.gethostname()},", f"home {tmp_path},"):
        assert part in described


def test_a_command_does_not_change_the_schema_under_a_server(empty_database_url: str) -> None:
    make_released(empty_database_url, "0002")
    engine = make_engine(empty_database_url)
    older = claim_on(engine)
    with alone(engine) as connection:
        older.take(connection, FIRST)
    with pytest.raises(StorageError, match=r"has schema 0002.*Stop that server first"):
        open_database(empty_database_url)
    engine.dispose()
    older.release()
    open_database(empty_database_url).close()


def test_nor_under_a_server_of_a_version_that_locks_its_home_alone(tmp_path: Path) -> None:
    make_released(sqlite_url(tmp_path), "0002")
    with (tmp_path / "server.lock").open("w") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="4711"):
            open_database(sqlite_url(tmp_path))
    open_database(sqlite_url(tmp_path)).close()


def restart(server: postgres.Postgres) -> None:
    server.stop("immediate")
    server.start()


def test_a_claim_outlives_a_restart_of_postgres(own_postgres: postgres.Postgres, own_postgres_url: str) -> None:
    first = open_database(own_postgres_url, serving=FIRST)
    restart(own_postgres)
    use(first)
    with pytest.raises(ConfigError, match=FIRST):
        open_database(own_postgres_url, serving=SECOND)
    first.close()


def test_a_server_that_lost_its_database_to_another_writes_nothing_more(
    own_postgres: postgres.Postgres, own_postgres_url: str
) -> None:
    first = open_database(own_postgres_url, serving=FIRST)
    use(first)
    restart(own_postgres)
    second = open_database(own_postgres_url, serving=SECOND)
    for _ in range(2):
        with pytest.raises(StorageError, match="taken over by another server"):
            use(first)
    assert first.is_lost
    use(second)
    assert not second.is_lost
    second.close()
    first.close()


def test_no_server_takes_over_while_a_single_connection_of_the_first_lives(own_postgres_url: str) -> None:
    """Its other connections may have broken: what it is in the middle of writing still counts."""
    first = open_database(own_postgres_url, serving=FIRST)
    with first.transaction() as connection:
        mine = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        postgres.execute(
            own_postgres_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tuft' "
            f"AND pid <> {mine}"
        )  # fmt: skip
        with pytest.raises(ConfigError, match=FIRST):
            open_database(own_postgres_url, serving=SECOND)
    first.close()
