"""Who sees which entries, of which day, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta

import pytest

from tuft.records import Tenant, now
from tuft.service.audit import Audit
from tuft.store.audit import AuditLog
from tuft.store.db import open_database
from tuft.store.tenants import TenantCatalog

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")


@pytest.fixture
def log(database_url: str) -> Iterator[AuditLog]:
    database = open_database(database_url)
    for tenant in (ALICE, BOB):
        TenantCatalog(database).ensure_tenant(tenant)
    yield AuditLog(database)
    database.close()


async def events(audit: Audit, tenant: Tenant, event_type: str = "all", day: date | None = None) -> list[str]:
    return [entry.event for entry in await audit.of_day(tenant, event_type, day or now().date())]


async def test_an_entry_is_seen_by_who_did_it_and_by_whose_thing_it_was(log: AuditLog) -> None:
    audit = Audit(log, retention_days=1)
    audit.note(BOB, "checkpoint_read", ALICE.tenant_id, purpose="training")
    audit.note(ALICE, "checkpoint_delete", ALICE.tenant_id)
    assert await events(audit, ALICE) == ["checkpoint_read", "checkpoint_delete"]
    assert await events(audit, BOB) == ["checkpoint_read"]
    (entry, _) = await audit.of_day(ALICE, "all", now().date())
    assert entry.details == {"actor": "urn:tuft:tenant:bob", "purpose": "training"}


async def test_entries_are_chosen_by_what_they_are_about(log: AuditLog) -> None:
    audit = Audit(log, retention_days=1)
    for event in ("checkpoint_save", "project_session_assign", "key_create", "checkpoints_of_another_kind"):
        audit.note(ALICE, event)
    assert await events(audit, ALICE, "checkpoints") == ["checkpoint_save"]
    assert await events(audit, ALICE, "projects") == ["project_session_assign"]
    assert await events(audit, ALICE, "organizations") == ["key_create"]
    assert await events(audit, ALICE, "teams") == []
    assert len(await events(audit, ALICE, "all")) == 4


async def test_a_day_is_one_of_utc(log: AuditLog) -> None:
    audit = Audit(log, retention_days=1)
    midnight = now().replace(hour=0, minute=0, second=0, microsecond=0)
    log.add([ALICE.tenant_id], midnight, "key_create", {})
    log.add([ALICE.tenant_id], midnight - timedelta(microseconds=1), "key_revoke", {})
    assert await events(audit, ALICE, day=midnight.date()) == ["key_create"]
    assert await events(audit, ALICE, day=midnight.date() - timedelta(days=1)) == ["key_revoke"]
    for day in (date.min, date.max, midnight.date() + timedelta(days=1)):
        assert await events(audit, ALICE, day=day) == []


async def test_what_is_left_out_of_a_long_day_is_said(log: AuditLog) -> None:
    audit = Audit(log, retention_days=1)
    log.add([ALICE.tenant_id] * 20_001, now() - timedelta(microseconds=1), "checkpoint_save", {})
    entries = await audit.of_day(ALICE, "all", now().date())
    assert len(entries) == 20_001
    assert (entries[0].event, entries[0].details) == ("audit_omitted", {"num_entries": 1})


async def test_the_sweep_forgets_what_is_older_than_the_retention(log: AuditLog) -> None:
    for age in (timedelta(days=3), timedelta(hours=1)):
        log.add([ALICE.tenant_id], now() - age, "key_create", {})
    await Audit(log, retention_days=2).sweep()
    entries, total = log.newest(ALICE.tenant_id, None, now() - timedelta(days=9), now(), limit=9)
    assert len(entries) == total == 1
