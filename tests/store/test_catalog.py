from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest

from tuft.records import Run, SamplerInfo, Session, Tenant, now
from tuft.store.catalog import Catalog
from tuft.store.db import open_database
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog
from tuft.types import LoraSpec

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")
SPEC = LoraSpec(rank=4, seed=2**40, train_unembed=False)


@pytest.fixture
def catalog(database_url: str) -> Iterator[Catalog]:
    database = open_database(database_url)
    opened = Catalog(database)
    for tenant in (ALICE, BOB):
        TenantCatalog(database).ensure_tenant(tenant)
    yield opened
    database.close()


def add_session(catalog: Catalog) -> None:
    SessionCatalog(catalog._database).add(Session("s1", ALICE.tenant_id, now(), (), {}, "0.38.0", None))


def run(run_id: str = "s1:train:0", tenant: Tenant = ALICE) -> Run:
    moment = now()
    seq = int(run_id.split(":")[-1])
    return Run(run_id, tenant.tenant_id, run_id.split(":")[0], seq, "m", SPEC, "live", moment, moment, {"x": "y"})


def test_what_was_written_is_read_back_equal(catalog: Catalog) -> None:
    add_session(catalog)
    catalog.add_run(written := replace(run(), optimizer="dimuon"))
    catalog.add_sampler(sampler := SamplerInfo("s1:sample:0", "tenant-a", "s1", 0, "m", None, "d1", now()))
    assert catalog.run(ALICE, written.run_id) == written
    assert catalog.sampler(ALICE, sampler.sampler_id) == sampler


def test_another_tenants_rows_are_not_found(catalog: Catalog) -> None:
    add_session(catalog)
    catalog.add_run(run())
    catalog.add_sampler(SamplerInfo("s1:sample:0", "tenant-a", "s1", 0, "m", None, None, now()))
    assert catalog.run(BOB, "s1:train:0") is None
    assert catalog.sampler(BOB, "s1:sample:0") is None
    assert catalog.samplers(BOB, "s1") == []
    assert catalog.runs(BOB, 10, 0, {}) == ([], 0)


def test_pages_come_newest_first_with_the_total(catalog: Catalog) -> None:
    add_session(catalog)
    moment = now()
    for index in range(5):
        catalog.add_run(replace(run(f"s1:train:{index}"), created_at=moment + timedelta(seconds=index)))
    page, total = catalog.runs(ALICE, limit=2, offset=1, shared={})
    assert ([found.model_seq_id for found in page], total) == ([3, 2], 5)


def test_the_next_server_finds_the_runs_that_take_operations(catalog: Catalog) -> None:
    add_session(catalog)
    catalog.add_run(run())
    catalog.add_run(replace(run("s1:train:1"), status="unloaded"))
    catalog.add_run(replace(run("s1:train:2"), status="creating"))
    assert [found.run_id for found in catalog.open_runs()] == ["s1:train:0", "s1:train:2"]
    catalog.delete_run("s1:train:2")
    assert [found.run_id for found in catalog.open_runs()] == ["s1:train:0"]
    assert catalog.run(ALICE, "s1:train:2") is None


def test_samplers_on_a_runs_mutable_weights_move_together(catalog: Catalog) -> None:
    add_session(catalog)
    for number in (0, 1):
        catalog.add_run(run(f"s1:train:{number}"))
    for number, inflight_run in enumerate(["s1:train:0", "s1:train:0", "s1:train:1", None]):
        sampler = SamplerInfo(f"s1:sample:{number}", "tenant-a", "s1", number, "m", None, f"d{number}", now())
        catalog.add_sampler(replace(sampler, inflight_run_id=inflight_run))
    assert catalog.move_inflight_samplers("s1:train:0", "d1") == ["d0"]
    assert [sampler.directory for sampler in catalog.samplers(ALICE, "s1")] == ["d1", "d1", "d2", "d3"]


def test_every_client_that_joins_is_counted_once(catalog: Catalog) -> None:
    add_session(catalog)
    catalog.add_sampler(SamplerInfo("s1:sample:0", "tenant-a", "s1", 0, "m", None, None, now()))
    assert [catalog.count_join(ALICE, "s1:sample:0") for _ in range(3)] == [1, 2, 3]
    assert catalog.count_join(BOB, "s1:sample:0") is None
    assert catalog.count_join(ALICE, "none") is None
