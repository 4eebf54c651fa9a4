"""What a checkpoint's name means, and for whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import update

from tuft.records import Checkpoint, CheckpointPath, Run, SamplerInfo, Session, Tenant, now
from tuft.store import tables
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.db import Database, open_database
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog
from tuft.types import CheckpointKind, LoraSpec

ALICE, BOB, EVE = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob"), Tenant("tenant-e", "eve")
SPEC = LoraSpec(rank=4, seed=2**40, train_unembed=False)
RUN = "s1:train:0"
KINDS: tuple[CheckpointKind, ...] = ("training", "sampler", "external")
DAY = timedelta(days=1)
SHARED = {"p": frozenset({"alice", "bob"})}


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """One run of alice's, in her session of project p; and one of eve's, who uses the same label for herself."""
    database = open_database(database_url)
    catalog, tenants, sessions, moment = Catalog(database), TenantCatalog(database), SessionCatalog(database), now()
    for tenant, session_id in ((ALICE, "s1"), (EVE, "s2"), (BOB, "s3")):
        tenants.ensure_tenant(tenant)
        sessions.add(Session(session_id, tenant.tenant_id, moment, (), {}, "0.38.0", None, project_id="p"))
        run_id = f"{session_id}:train:0"
        catalog.add_run(
            Run(run_id, tenant.tenant_id, session_id, 0, "m", SPEC, "live", moment, moment, {}, optimizer="dimuon")
        )
    yield database
    database.close()


@pytest.fixture
def checkpoints(database: Database) -> CheckpointCatalog:
    return CheckpointCatalog(database)


def checkpoint(name: str = "c", directory: str = "d1", run_id: str = RUN, tenant: Tenant = ALICE) -> Checkpoint:
    path = CheckpointPath(run_id, "training", name)
    return Checkpoint(path, tenant.tenant_id, "m", SPEC, directory, 10, True, now(), None, {"k": "v"}, "dimuon")


def test_what_was_written_is_read_back_equal(checkpoints: CheckpointCatalog) -> None:
    written = checkpoint()
    checkpoints.put(written)
    assert checkpoints.owned(ALICE, written.path) == written
    assert checkpoints.owned(BOB, written.path) is None
    assert checkpoints.get(written.path) == written


def test_who_may_read_it(checkpoints: CheckpointCatalog) -> None:
    path = checkpoint().path
    checkpoints.put(checkpoint())
    checkpoints.put(hers := checkpoint(run_id="s2:train:0", tenant=EVE))
    assert checkpoints.within_reach(ALICE, {}, path) is not None
    assert checkpoints.within_reach(BOB, {}, path) is None
    assert checkpoints.within_reach(BOB, SHARED, path) is not None
    assert checkpoints.within_reach(BOB, SHARED, hers.path) is None, "eve is no member"
    checkpoints.set_public(path, True)
    assert checkpoints.within_reach(EVE, {}, path) is not None
    checkpoints.set_public(path, False)
    assert checkpoints.within_reach(EVE, {}, path) is None


def test_saving_a_name_again_moves_it_in_one_step_and_takes_it_back_from_the_public(
    checkpoints: CheckpointCatalog,
) -> None:
    assert checkpoints.put(checkpoint(directory="d1")) is None
    checkpoints.set_public(checkpoint().path, True)
    assert checkpoints.put(checkpoint(directory="d2")) == "d1"
    found = checkpoints.get(checkpoint().path)
    assert found is not None
    assert (found.directory, found.public) == ("d2", False)
    assert (checkpoints.is_named("d1"), checkpoints.is_named("d2")) == (False, True)


def test_a_sampler_keeps_its_directory_until_it_is_forgotten(
    checkpoints: CheckpointCatalog, database: Database
) -> None:
    catalog = Catalog(database)
    checkpoints.put(checkpoint())
    catalog.add_sampler(SamplerInfo("s3:sample:0", BOB.tenant_id, "s3", 0, "m", str(checkpoint().path), "d1", now()))
    assert catalog.delete_ephemeral_samplers("s3") == []
    checkpoints.delete(checkpoint().path)
    assert checkpoints.is_named("d1")
    assert catalog.ephemeral_sessions() == {"s3"}
    assert catalog.delete_ephemeral_samplers("s3") == ["d1"]
    assert not checkpoints.is_named("d1")


def test_an_expired_checkpoint_is_not_found_even_before_it_is_deleted(checkpoints: CheckpointCatalog) -> None:
    past, soon = now() - timedelta(seconds=1), now() + timedelta(hours=5)
    checkpoints.put(old := replace(checkpoint("old"), expires_at=past, public=True))
    checkpoints.put(young := replace(checkpoint("young"), expires_at=soon))
    checkpoints.put(checkpoint("eternal"))
    assert checkpoints.get(old.path) is checkpoints.within_reach(BOB, {}, old.path) is None
    assert {found.path.name for found in checkpoints.page(ALICE.tenant_id, KINDS, 10, 0)[0]} == {"young", "eternal"}
    assert checkpoints.expiring(ALICE, now() + timedelta(hours=24), limit=5) == ([young], 1)
    assert checkpoints.expiring(BOB, now() + timedelta(hours=24), limit=5) == ([], 0)
    checkpoints.set_expiry(young.path, None)
    assert checkpoints.expiring(ALICE, now() + timedelta(hours=24), limit=5) == ([], 0)
    assert [found.path.name for found in checkpoints.delete_expired()] == ["old"]
    assert checkpoints.delete_expired() == []


def test_pages_come_newest_first_with_the_total(checkpoints: CheckpointCatalog) -> None:
    moment = now()
    for index in range(5):
        checkpoints.put(replace(checkpoint(f"c{index}"), created_at=moment + timedelta(seconds=index)))
    checkpoints.put(checkpoint(run_id="s2:train:0", tenant=EVE))
    page, total = checkpoints.page(ALICE.tenant_id, KINDS, limit=2, offset=1)
    assert ([found.path.name for found in page], total) == (["c3", "c2"], 5)
    assert checkpoints.page(EVE.tenant_id, KINDS, 10, 0, run_id=RUN) == ([], 0)
    assert checkpoints.page(ALICE.tenant_id, ["external"], 10, 0) == ([], 0)


def test_the_newest_of_each_kind_and_run_is_found_at_once(checkpoints: CheckpointCatalog) -> None:
    moment = now()
    sampler = replace(checkpoint(), path=CheckpointPath(RUN, "sampler", "x"), created_at=moment)
    for found in (replace(checkpoint("a"), created_at=moment), sampler):
        checkpoints.put(found)
    checkpoints.put(replace(checkpoint("b"), created_at=moment + timedelta(seconds=1)))
    checkpoints.put(checkpoint(run_id="s2:train:0", tenant=EVE))
    newest = checkpoints.newest([RUN, "s3:train:0"])
    assert {key: found.path.name for key, found in newest.items()} == {(RUN, "training"): "b", (RUN, "sampler"): "x"}


def test_what_is_damaged_is_in_no_list_and_says_so_under_its_name(checkpoints: CheckpointCatalog) -> None:
    soon = now() + timedelta(hours=1)
    checkpoints.put(replace(checkpoint("a", directory="d1"), expires_at=soon, digest="abc"))
    checkpoints.put(replace(checkpoint("copy", directory="d1"), expires_at=soon, digest="abc"))
    checkpoints.put(replace(checkpoint("b", directory="d2"), expires_at=soon))
    assert (checkpoints.digest("d1"), checkpoints.digest("d2"), checkpoints.digest("d3")) == ("abc", None, None)
    assert checkpoints.note_verified("d1", "a bit flipped")
    assert not checkpoints.note_verified("d3", "gone meanwhile")
    for found in (checkpoints.page(ALICE.tenant_id, KINDS, 10, 0), checkpoints.expiring(ALICE, soon + DAY, limit=5)):
        assert ([one.path.name for one in found[0]], found[1]) == (["b"], 1)
    assert {one.path.name for one in checkpoints.newest([RUN]).values()} == {"b"}
    assert {one.path.name: one.damage for one in checkpoints.all(ALICE.tenant_id)} == {
        "a": "a bit flipped",
        "b": None,
        "copy": "a bit flipped",
    }
    named = checkpoints.owned(ALICE, checkpoint("copy").path)
    assert named is not None
    assert named.damage == "a bit flipped"
    checkpoints.note_verified("d1", None)
    assert checkpoints.page(ALICE.tenant_id, KINDS, 10, 0)[1] == 3


def test_the_one_that_was_not_looked_at_for_longest_is_next(checkpoints: CheckpointCatalog) -> None:
    moment = now()
    for age_days, name in ((1, "young"), (9, "old"), (8, "older server's")):
        checkpoints.put(replace(checkpoint(name, directory=name), created_at=moment - age_days * DAY))
    with checkpoints._database.transaction() as connection:
        table = tables.checkpoints
        connection.execute(update(table).where(table.c.name == "older server's").values(verified_at=None))

    def next_one(damaged_before: timedelta) -> str | None:
        found = checkpoints.to_verify(moment - 7 * DAY, now() - damaged_before)
        return None if found is None else found.directory

    assert next_one(DAY) == "older server's"
    checkpoints.note_verified("older server's", None)
    assert next_one(DAY) == "old"
    checkpoints.note_verified("old", "cut off")
    assert next_one(DAY) is None
    assert next_one(-DAY) == "old", "what is damaged is looked at sooner"


def test_every_directory_that_something_reads_from_is_known(checkpoints: CheckpointCatalog, database: Database) -> None:
    checkpoints.put(checkpoint(directory="d1"))
    for number, directory in enumerate(("d2", None)):
        sampler = SamplerInfo(f"s1:sample:{number}", ALICE.tenant_id, "s1", number, "m", None, directory, now())
        Catalog(database).add_sampler(sampler)
    assert checkpoints.named_directories() == {"d1", "d2"}
