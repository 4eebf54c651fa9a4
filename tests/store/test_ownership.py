"""Whose an id is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from tuft.losses import CustomLoss
from tuft.records import (
    Checkpoint,
    CheckpointPath,
    FutureKey,
    JournaledFuture,
    Run,
    SamplerInfo,
    Session,
    Tenant,
    now,
)
from tuft.store import tables
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.custom_losses import CustomLossTable
from tuft.store.db import Database, open_database
from tuft.store.journal import Accepted, Journal
from tuft.store.ownership import KINDS, Owners, own, within_reach
from tuft.store.sessions import SessionCatalog
from tuft.store.spool import Spool
from tuft.store.tenants import TenantCatalog
from tuft.types import LoraSpec

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")
PATH = CheckpointPath("s:train:0", "training", "base")
HERS = {
    "session": "s",
    "run": "s:train:0",
    "sampler": "s:sample:0",
    "sequence": "s:sample:0:7:1",
    "future": "future-1",
    "checkpoint": str(PATH),
    "link": str(PATH),
    "trace": "s",
    "custom_loss": "s:loss:0",
}


@pytest.fixture
def database(database_url: str, tmp_path: Path) -> Iterator[Database]:
    """Alice has one of each kind."""
    database = open_database(database_url)
    for tenant in (ALICE, BOB):
        TenantCatalog(database).ensure_tenant(tenant)
    moment = now()
    SessionCatalog(database).add(Session("s", ALICE.tenant_id, moment, (), {}, "0", None, project_id="team"))
    run = Run("s:train:0", ALICE.tenant_id, "s", 0, "m", LoraSpec(), "live", moment, moment, {})
    Catalog(database).add_run(run)
    Catalog(database).add_sampler(SamplerInfo("s:sample:0", ALICE.tenant_id, "s", 0, "m", None, None, moment))
    CheckpointCatalog(database).put(
        Checkpoint(PATH, ALICE.tenant_id, "m", LoraSpec(), "a/b/c", 1, False, moment, None, {})
    )
    CustomLossTable(database).add(ALICE, "s", 0, "s:loss:0", CustomLoss("loss", (), "[]"))
    key = FutureKey("operation", "s:train:0", 1)
    future = JournaledFuture("future-1", ALICE.tenant_id, 0, key, "step", "digest", 0, 0, moment)
    Journal(database, Spool(tmp_path)).write([Accepted(future, b"")])
    yield database
    database.close()


def test_the_owner_of_each_kind_is_found_and_of_nothing_else(database: Database) -> None:
    owners = Owners(database)
    assert HERS.keys() == KINDS
    for kind, named in HERS.items():
        assert owners.owner(kind, named) == ALICE.tenant_id, kind
        for other in (named[:-1], f"{named}x", named.upper(), "", "x" * 300, "' OR 1=1 --"):
            if kind != "sequence" or not other.startswith("s:sample:0:"):
                assert owners.owner(kind, other) is None, (kind, other)


def test_what_cannot_be_a_path_is_nobodys(database: Database) -> None:
    for path in ("tinker://", "/etc/passwd", "tinker://s:train:0/weights/../base", "tinker://s:train:0/x/base"):
        assert Owners(database).owner("checkpoint", path) is None


def test_a_tenant_has_a_name(database: Database) -> None:
    assert Owners(database).name(BOB.tenant_id) == "bob"
    assert Owners(database).name("nobody") == ""


def test_own_is_of_the_tenant_alone_and_within_reach_of_members_too(database: Database) -> None:
    table = tables.sessions
    shared = {"team": frozenset({"alice", "bob"})}
    for tenant, reach, is_found in (
        (ALICE, own(table, ALICE), True),
        (BOB, own(table, BOB), False),
        (BOB, within_reach(BOB, {}), False),
        (BOB, within_reach(BOB, shared), True),
        (BOB, within_reach(BOB, {"team": frozenset({"bob"})}), False),
        (BOB, within_reach(BOB, {"another": frozenset({"alice", "bob"})}), False),
    ):
        found = database.first(select(table.c.session_id).where(reach))
        assert (found is not None) == is_found, tenant
