"""The databases that tests open: SQLite in a file, and PostgreSQL where there is one. CI must have it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import postgres
from tuft.store.db import open_database, sqlite_url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server on which databases can be made."""
    if postgres.VARIABLE in os.environ:
        yield os.environ[postgres.VARIABLE]
    elif postgres.programs() is not None:
        with postgres.running() as server:
            yield server.url
    else:
        reason = "PostgreSQL is not installed: apt-get install postgresql, or set " + postgres.VARIABLE
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def own_postgres(postgres_server: str) -> Iterator[postgres.Postgres]:
    """A server of these tests' own, which they may stop and start. They leave it running."""
    if postgres.programs() is None:
        pytest.skip(f"{postgres_server} is elsewhere, and PostgreSQL is not installed here")
    with postgres.running() as server:
        yield server


@pytest.fixture
def own_postgres_url(own_postgres: postgres.Postgres) -> Iterator[str]:
    """An empty database on it."""
    with postgres.new_database(own_postgres.url) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: str) -> Iterator[str]:
    """The name of a database with today's tables, to copy: that is quicker than to migrate."""
    with postgres.new_database(postgres_server) as url:
        open_database(url).close()
        yield url.rpartition("/")[2]


@pytest.fixture
def empty_postgres_url(postgres_server: str) -> Iterator[str]:
    with postgres.new_database(postgres_server) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str, migrated_postgres: str) -> Iterator[str]:
    """A database with today's tables, empty."""
    with postgres.new_database(postgres_server, template=migrated_postgres) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of the test's own: each test that asks for it runs on both."""
    return sqlite_url(tmp_path) if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same before its first migration."""
    return sqlite_url(tmp_path) if request.param == "sqlite" else str(request.getfixturevalue("empty_postgres_url"))
