from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tuft.records import Checkpoint, CheckpointPath, Run, SamplerInfo, Session, Tenant, now
from tuft.store.catalog import Catalog
from tuft.store.db import open_database, sqlite_url
from tuft.types import LoraSpec

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")
SPEC = LoraSpec(rank=4, seed=2**40, train_unembed=False)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    database = open_database(sqlite_url(tmp_path))
    opened = Catalog(database)
    for tenant in (ALICE, BOB):
        opened.ensure_tenant(tenant)
    yield opened
    database.close()


def session(session_id: str = "s1", tenant: Tenant = ALICE) -> Session:
    return Session(session_id, tenant.tenant_id, now(), ("a", "b"), {"k": "v"}, "0.38.0", None)


def run(run_id: str = "s1:train:0", tenant: Tenant = ALICE) -> Run:
    moment = now()
    seq = int(run_id.split(":")[-1])
    return Run(run_id, tenant.tenant_id, run_id.split(":")[0], seq, "m", SPEC, "live", moment, moment, {"x": "y"})


def checkpoint(name: str = "c", directory: str = "d1", tenant: Tenant = ALICE) -> Checkpoint:
    path = CheckpointPath("s1:train:0", "training", name)
    return Checkpoint(path, tenant.tenant_id, "m", SPEC, directory, 10, True, now(), None, {})


def test_what_was_written_is_read_back_equal(catalog: Catalog) -> None:
    catalog.add_session(session())
    catalog.add_run(written := run())
    catalog.put_checkpoint(saved := checkpoint())
    catalog.add_sampler(sampler := SamplerInfo("s1:sample:0", "tenant-a", "s1", 0, "m", None, "d1", now()))
    assert catalog.run(ALICE, written.run_id) == written
    assert catalog.checkpoint(ALICE, saved.path) == saved
    assert catalog.sampler(ALICE, sampler.sampler_id) == sampler
    found = catalog.session(ALICE, "s1")
    assert found is not None
    assert (found.tags, found.user_metadata, found.finished) == (("a", "b"), {"k": "v"}, False)


def test_another_tenants_rows_are_not_found(catalog: Catalog) -> None:
    catalog.add_session(session())
    catalog.add_run(run())
    catalog.put_checkpoint(checkpoint())
    catalog.add_sampler(SamplerInfo("s1:sample:0", "tenant-a", "s1", 0, "m", None, None, now()))
    assert catalog.session(BOB, "s1") is None
    assert catalog.run(BOB, "s1:train:0") is None
    assert catalog.checkpoint(BOB, checkpoint().path) is None
    assert catalog.sampler(BOB, "s1:sample:0") is None
    assert catalog.samplers(BOB, "s1") == []
    assert catalog.runs(BOB, 10, 0) == catalog.checkpoints(BOB, 10, 0) == catalog.sessions(BOB, 10, 0) == ([], 0)


def test_pages_come_newest_first_with_the_total(catalog: Catalog) -> None:
    catalog.add_session(session())
    moment = now()
    for index in range(5):
        catalog.add_run(replace(run(f"s1:train:{index}"), created_at=moment + timedelta(seconds=index)))
    page, total = catalog.runs(ALICE, limit=2, offset=1)
    assert ([found.model_seq_id for found in page], total) == ([3, 2], 5)


def test_saving_a_name_again_moves_it_in_one_step(catalog: Catalog) -> None:
    catalog.add_session(session())
    catalog.add_run(run())
    assert catalog.put_checkpoint(checkpoint(directory="d1")) is None
    assert catalog.put_checkpoint(checkpoint(directory="d2")) == "d1"
    found = catalog.checkpoint(ALICE, checkpoint().path)
    assert found is not None
    assert found.directory == "d2"
    assert catalog.live_directories() == {"d2"}


def test_an_expired_checkpoint_is_not_found_and_is_deleted(catalog: Catalog) -> None:
    catalog.add_session(session())
    catalog.add_run(run())
    catalog.put_checkpoint(replace(checkpoint(), expires_at=now() - timedelta(seconds=1)))
    assert catalog.checkpoint(ALICE, checkpoint().path) is None
    assert catalog.delete_expired_checkpoints() == ["d1"]


def test_the_first_reason_for_finishing_wins(catalog: Catalog) -> None:
    catalog.add_session(session())
    catalog.finish_session("s1", "success", None)
    catalog.finish_session("s1", "errored", "late")
    with catalog._database.transaction() as connection:
        assert connection.exec_driver_sql("SELECT finish_reason FROM sessions").scalar() == "success"


def test_runs_that_were_live_are_lost_after_a_restart(catalog: Catalog) -> None:
    catalog.add_session(session())
    catalog.add_run(run())
    catalog.add_run(replace(run("s1:train:1"), status="unloaded"))
    assert catalog.lose_live_runs() == 1
    statuses = {found.run_id: found.status for found in catalog.runs(ALICE, 10, 0)[0]}
    assert statuses == {"s1:train:0": "lost", "s1:train:1": "unloaded"}


def test_a_key_belongs_to_its_tenant(catalog: Catalog) -> None:
    catalog.add_key(ALICE, "hash", "1234")
    assert catalog.tenant_of_key("hash") == ALICE
    assert catalog.tenant_of_key("other") is None


def test_a_tenants_name_names_one_tenant(catalog: Catalog) -> None:
    assert catalog.ensure_tenant(Tenant("tenant-z", "alice")) == ALICE
