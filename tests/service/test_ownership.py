"""What is written down of those who reach for what is another's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tuft.errors import NotFound, StorageError, refusing
from tuft.records import Session, Tenant, now
from tuft.service import ownership as module
from tuft.service.audit import DENIED, Audit
from tuft.service.ownership import LINK_DENIED, Ownership
from tuft.service.settlements import failure
from tuft.store.audit import AuditLog
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.ownership import Owners
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")


@pytest.fixture
def database(tmp_path: Any) -> Iterator[Database]:
    """Alice has sessions."""
    database = open_database(sqlite_url(tmp_path))
    for tenant in (ALICE, BOB):
        TenantCatalog(database).ensure_tenant(tenant)
    for number in range(10):
        SessionCatalog(database).add(Session(f"s{number}", ALICE.tenant_id, now(), (), {}, "0", None))
    yield database
    database.close()


@pytest.fixture
def audit(database: Database) -> Audit:
    return Audit(AuditLog(database), retention_days=1)


@pytest.fixture
def ownership(database: Database, audit: Audit) -> Ownership:
    return Ownership(Owners(database), audit)


async def rows(audit: Audit, tenant: Tenant, event: str = DENIED) -> list[dict[str, Any]]:
    entries = await audit.of_day(tenant, "all", now().date(), for_operator=True)
    return [dict(entry.details) for entry in entries if entry.event == event]


async def test_another_tenants_thing_leaves_a_row_with_who_wanted_what_how(ownership: Ownership, audit: Audit) -> None:
    ownership.refused(("session", "s1"), "GET /sessions/{session_id}", BOB.tenant_id)
    await ownership.look_into_all()
    assert await rows(audit, BOB) == [
        {"actor": BOB.urn, "kind": "session", "id": "s1", "action": "GET /sessions/{session_id}"}
    ]
    assert await rows(audit, ALICE) == []


async def test_who_was_refused_does_not_see_the_row(ownership: Ownership, audit: Audit) -> None:
    ownership.refused(("session", "s1"), "x", BOB.tenant_id)
    await ownership.look_into_all()
    assert await audit.of_day(BOB, "all", now().date()) == []


async def test_what_is_nobodys_or_ones_own_leaves_none(ownership: Ownership, audit: Audit) -> None:
    ownership.refused(("session", "s99"), "x", BOB.tenant_id)
    ownership.refused(("session", "s1"), "x", ALICE.tenant_id)  # finished, say
    ownership.refused(("checkpoint", "no path"), "x", BOB.tenant_id)
    await ownership.look_into_all()
    assert await rows(audit, BOB) == await rows(audit, ALICE) == []


async def test_a_bad_link_is_told_to_the_owner(ownership: Ownership, audit: Audit) -> None:
    ownership.refused(("trace", "s1"), "x")
    await ownership.look_into_all()
    (entry,) = await audit.of_day(ALICE, "all", now().date())
    assert (entry.event, entry.details["actor"]) == (LINK_DENIED, "urn:tuft:anyone")


async def test_a_project_is_told_of_without_being_looked_for(ownership: Ownership, audit: Audit) -> None:
    ownership.told_of_project(BOB, "team")
    await ownership.look_into_all()
    assert await rows(audit, BOB) == [{"actor": BOB.urn, "kind": "project", "id": "team", "action": "project"}]


async def test_the_same_again_within_a_minute_is_the_same_row(
    ownership: Ownership, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        for _ in range(5):
            ownership.refused(("session", "s1"), "x", BOB.tenant_id)
        await ownership.look_into_all()
    assert len(await rows(audit, BOB)) == 1
    monkeypatch.setattr(module, "_NOTED_FOR_S", 0.0)
    ownership.refused(("session", "s1"), "x", BOB.tenant_id)
    await ownership.look_into_all()
    assert len(await rows(audit, BOB)) == 2


async def test_one_who_tries_very_many_ids_hides_no_one_elses_tries(ownership: Ownership, audit: Audit) -> None:
    for number in range(5000):
        ownership.refused(("session", f"guess {number}"), "x", ALICE.tenant_id)
    ownership.refused(("session", "s1"), "x", BOB.tenant_id)
    assert len(ownership._waiting) == 1001
    await ownership.look_into_all()
    assert len(await rows(audit, BOB)) == 1
    assert not ownership._waiting


async def test_ids_that_are_none_are_not_even_kept(ownership: Ownership) -> None:
    ownership.refused(("session", "x" * 10**6), "x", BOB.tenant_id)
    assert not ownership._waiting


async def test_a_database_that_refuses_costs_its_rows_only(
    ownership: Ownership, audit: Audit, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE sessions RENAME TO gone")
    ownership.refused(("session", "s1"), "x", BOB.tenant_id)
    ownership.refused(("run", "r1"), "x", BOB.tenant_id)
    await ownership.look_into_all()
    with database.transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO sessions")
    ownership.refused(("session", "s1"), "x", BOB.tenant_id)
    await ownership.look_into_all()
    assert len(await rows(audit, BOB)) == 1


async def test_it_looks_soon_and_not_at_once(
    ownership: Ownership, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHECK_AFTER_S", 0.01)
    serving = asyncio.create_task(ownership.serve())
    try:
        ownership.refused(("session", "s2"), "x", BOB.tenant_id)
        assert await rows(audit, BOB) == []
        async with asyncio.timeout(10):
            while not await rows(audit, BOB):
                await asyncio.sleep(0.01)
    finally:
        serving.cancel()


def test_an_error_that_fails_a_future_still_says_what_it_refused() -> None:
    error = refusing("run", "r", NotFound("model_id: 'r' is unknown"))
    assert failure(error).refused == ("run", "r")
    assert failure(StorageError("x")).refused is None
