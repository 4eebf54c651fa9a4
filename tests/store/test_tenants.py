from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from tests.store.released import DIGESTS, make_released
from tuft.config import ALL_SCOPES, USER_SCOPES
from tuft.records import ApiKey, Tenant, now
from tuft.store.audit import AuditLog, NewEntry
from tuft.store.db import Database, open_database
from tuft.store.tenants import TenantCatalog

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def catalog(database: Database) -> TenantCatalog:
    opened = TenantCatalog(database)
    for tenant in (ALICE, BOB):
        opened.ensure_tenant(tenant)
    return opened


def key(key_id: str = "hash", tenant: Tenant = ALICE) -> ApiKey:
    return ApiKey(key_id, tenant, "1234", now(), "laptop", ALL_SCOPES, now() + timedelta(days=1))


def test_a_tenants_name_names_one_tenant(catalog: TenantCatalog) -> None:
    assert catalog.ensure_tenant(Tenant("tenant-z", "alice")) == (ALICE, False)
    carol = Tenant("tenant-c", "carol")
    assert catalog.ensure_tenant(carol) == (carol, True)
    assert catalog.named("carol") == carol
    assert catalog.named("dave") is None


def test_a_key_is_read_back_as_it_was_written(catalog: TenantCatalog) -> None:
    catalog.add_key(written := key())
    assert catalog.key("hash") == written
    assert catalog.key("other") is None


def test_a_key_is_found_by_its_number(catalog: TenantCatalog) -> None:
    first, second = key("0a" * 32), key("b0" * 32, BOB)
    for written in (first, second):
        catalog.add_key(written)
    assert catalog.numbered(first.number) == first
    assert catalog.numbered(second.number) == second
    assert catalog.numbered(first.number + 1) is None


def test_a_revoked_key_keeps_its_row_and_its_first_moment(catalog: TenantCatalog) -> None:
    catalog.add_key(written := key())
    moment = now()
    assert catalog.revoke_key("hash", moment)
    assert not catalog.revoke_key("hash", moment + timedelta(hours=1))
    assert catalog.key("hash") == replace(written, revoked_at=moment)
    assert not catalog.has_valid_keys()


def test_a_key_that_is_replaced_ends_sooner_and_never_later(catalog: TenantCatalog) -> None:
    catalog.add_key(written := key())
    assert written.expires_at is not None
    catalog.replace_key("hash", written.expires_at + timedelta(hours=1), second := key("second"))
    assert catalog.key("hash") == written
    catalog.replace_key("hash", sooner := now(), key("third"))
    assert catalog.key("hash") == replace(written, expires_at=sooner)
    assert catalog.key("second") == second


def test_there_is_no_change_without_its_entry(catalog: TenantCatalog) -> None:
    catalog.add_key(key())
    unwritable = NewEntry(frozenset({"no-such-tenant"}), now(), "key_create", {})
    changes: tuple[Callable[[], object], ...] = (
        lambda: catalog.add_key(key("second"), unwritable),
        lambda: catalog.replace_key("hash", now(), key("second"), unwritable),
        lambda: catalog.revoke_key("hash", now(), unwritable),
        lambda: catalog.set_suspended(ALICE, now(), unwritable),
        lambda: catalog.ensure_tenant(Tenant("tenant-c", "carol"), unwritable),
    )
    for change in changes:
        with pytest.raises(IntegrityError):
            change()
    assert catalog.named("carol") is None
    assert catalog.key("second") is None
    found = catalog.key("hash")
    assert found is not None
    assert found.state(now()) == "valid"


def test_an_entry_is_written_with_its_change_and_only_then(database: Database, catalog: TenantCatalog) -> None:
    entry = NewEntry(frozenset({ALICE.tenant_id, BOB.tenant_id}), now(), "key_revoke", {"actor": "x"})
    catalog.add_key(key())
    for _ in range(2):
        catalog.revoke_key("hash", now(), entry)
    entries, total = AuditLog(database).newest(None, None, entry.at, now(), 10)
    assert total == 2
    assert {(found.tenant, found.event) for found in entries} == {("alice", "key_revoke"), ("bob", "key_revoke")}


def test_keys_are_listed_by_tenant_and_age_in_pages(catalog: TenantCatalog) -> None:
    keys = [key(f"{index:064x}", BOB if index % 2 else ALICE) for index in range(5)]
    for written in reversed(keys):
        catalog.add_key(written)
    page, total = catalog.keys(None, limit=2, offset=2)
    assert ([found.key_id for found in page], total) == ([keys[4].key_id, keys[1].key_id], 5)
    assert catalog.keys(BOB, 10, 0) == ([keys[1], keys[3]], 2)


def test_suspension_shows_with_the_tenant_and_with_its_keys(catalog: TenantCatalog) -> None:
    catalog.add_key(key())
    moment = now()
    assert catalog.set_suspended(ALICE, moment)
    assert not catalog.set_suspended(ALICE, now())
    found = catalog.key("hash")
    assert found is not None
    assert found.suspended
    assert catalog.is_suspended(ALICE)
    assert not catalog.is_suspended(BOB)
    summaries, total = catalog.tenants(10, 0)
    assert total == 2
    assert [(item.tenant, item.suspended_at, item.num_keys) for item in summaries] == [
        (ALICE, moment, 1),
        (BOB, None, 0),
    ]
    assert catalog.set_suspended(ALICE, None)
    assert not catalog.is_suspended(ALICE)


def test_tenants_count_the_keys_that_open_the_door(catalog: TenantCatalog) -> None:
    for key_id in ("1", "2", "3"):
        catalog.add_key(key(key_id))
    catalog.revoke_key("1", now())
    catalog.replace_key("2", now(), replace(key("4"), expires_at=now()))
    assert [item.num_keys for item in catalog.tenants(10, 0)[0]] == [1, 0]


def test_the_last_use_of_keys_is_kept(catalog: TenantCatalog) -> None:
    catalog.add_key(key())
    catalog.note_use({"hash": (moment := now())})
    found = catalog.key("hash")
    assert found is not None
    assert found.last_used_at == moment


@pytest.mark.parametrize("revision", sorted(DIGESTS))
def test_in_the_home_of_a_released_version_the_first_key_is_an_admins(empty_database_url: str, revision: str) -> None:
    make_released(empty_database_url, revision)
    database = open_database(empty_database_url)
    keys = {key.tenant.name: key for key in TenantCatalog(database).keys(None, 10, 0)[0]}
    database.close()
    assert keys["default"].scopes == ALL_SCOPES
    assert keys["Jörg"].scopes == USER_SCOPES
    assert {key.state(now()) for key in keys.values()} == {"valid"}
