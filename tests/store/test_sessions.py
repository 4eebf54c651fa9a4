"""Which sessions are found: whose they are, what they have in common, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tuft.records import (
    Checkpoint,
    CheckpointPath,
    Run,
    RunStatus,
    Session,
    SessionSearch,
    SessionSummary,
    Shared,
    StatusFilter,
    Tenant,
    now,
)
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.db import Database, open_database
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog
from tuft.types import LoraSpec

ALICE, BOB, CAROL = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob"), Tenant("tenant-c", "carol")
TEAM: Shared = {"team": frozenset({"alice", "bob"})}
START = now()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    for tenant in (ALICE, BOB, CAROL):
        TenantCatalog(opened).ensure_tenant(tenant)
    yield opened
    opened.close()


@pytest.fixture
def catalog(database: Database) -> SessionCatalog:
    return SessionCatalog(database)


def session(number: int, owner: Tenant = ALICE, **more: Any) -> Session:
    created_at = START + timedelta(seconds=number)
    plain = Session(f"s{number}", owner.tenant_id, created_at, ("a", "b"), {"k": "v"}, "0.38.0", None)
    return replace(plain, **more)


def add_run(database: Database, session_id: str, number: int, status: RunStatus = "live") -> Run:
    moment = now()
    run_id = f"{session_id}:train:{number}"
    run = Run(run_id, ALICE.tenant_id, session_id, number, "m", LoraSpec(), status, moment, moment, {})
    Catalog(database).add_run(run)
    return run


def found(catalog: SessionCatalog, tenant: Tenant = ALICE, shared: Shared | None = None, **search: Any) -> list[str]:
    return [summary.session.session_id for summary in summaries(catalog, tenant, shared, **search)]


def summaries(
    catalog: SessionCatalog, tenant: Tenant = ALICE, shared: Shared | None = None, **search: Any
) -> list[SessionSummary]:
    return catalog.search(tenant, shared or {}, SessionSearch(**search), heard_since=START)[0]


def test_what_was_written_is_read_back_equal(catalog: SessionCatalog) -> None:
    written = session(1, display_name="mine", project_id="p")
    catalog.add(written)
    assert catalog.session(ALICE, "s1") == written
    assert catalog.session(ALICE, "s2") is None


def test_the_first_reason_for_finishing_wins(catalog: SessionCatalog) -> None:
    catalog.add(session(1))
    assert catalog.finish("s1", "success", None)
    assert not catalog.finish("s1", "errored", "late")
    found = catalog.session(ALICE, "s1")
    assert found is not None
    assert (found.finished, found.finish_reason, found.finish_detail) == (True, "success", None)


def test_a_shared_project_opens_what_its_members_put_there_and_nothing_else(catalog: SessionCatalog) -> None:
    catalog.add(session(1, ALICE, project_id="team"))
    catalog.add(session(2, ALICE, project_id="label"))
    catalog.add(session(3, ALICE))
    catalog.add(session(4, CAROL, project_id="team"))  # her label, before or after the project was shared by others
    assert [item.session_id for item in catalog.page(BOB, 10, 0, TEAM)[0]] == ["s1"]
    assert catalog.session(BOB, "s1", TEAM) == session(1, ALICE, project_id="team")
    assert catalog.session(BOB, "s1") is None
    assert [catalog.session(BOB, f"s{number}", TEAM) for number in (2, 3, 4)] == [None] * 3
    assert found(catalog, BOB, TEAM) == ["s1"]
    assert found(catalog, CAROL) == ["s4"]


def test_pages_of_a_search_hold_every_session_once_newest_first(catalog: SessionCatalog) -> None:
    for number in range(7):
        catalog.add(session(number, created_at=START + timedelta(seconds=number // 3)))  # three at one moment
    pages, after = [], None
    while True:
        page, after = catalog.search(ALICE, {}, SessionSearch(limit=2, after=after), heard_since=START)
        pages.append([summary.session.session_id for summary in page])
        if after is None:
            break
    assert pages == [["s6", "s5"], ["s4", "s3"], ["s2", "s1"], ["s0"]]


def test_a_full_last_page_has_no_next(catalog: SessionCatalog) -> None:
    for number in range(2):
        catalog.add(session(number))
    assert catalog.search(ALICE, {}, SessionSearch(limit=2), heard_since=START)[1] is None


def test_every_word_of_a_name_must_be_in_it_in_any_case_and_order(catalog: SessionCatalog) -> None:
    catalog.add(session(1, display_name="Nightly ÜBUNG of 50%"))
    catalog.add(session(2, display_name="nightly 500"))
    catalog.add(session(3))
    assert found(catalog, name_words=("übung", "NIGHT")) == ["s1"]
    assert found(catalog, name_words=("nightly",)) == ["s2", "s1"]
    assert found(catalog, name_words=("50%",)) == ["s1"]
    assert found(catalog, name_words=("nightly", "missing")) == []
    assert found(catalog, session_id="s3", name_words=("500",)) == ["s3", "s2"]
    assert found(catalog, session_id="s3") == ["s3"]


def test_every_pair_of_the_metadata_must_hold(catalog: SessionCatalog) -> None:
    catalog.add(session(1, user_metadata={'a "quoted" $.key': "x", "n": "1"}))
    catalog.add(session(2, user_metadata={"n": "1"}))
    assert found(catalog, user_metadata={"n": "1"}) == ["s2", "s1"]
    assert found(catalog, user_metadata={"n": "1", 'a "quoted" $.key': "x"}) == ["s1"]
    assert found(catalog, user_metadata={"n": "10"}) == []


def test_a_session_without_a_project_is_in_the_default_one(catalog: SessionCatalog) -> None:
    catalog.add(session(1))
    catalog.add(session(2, project_id="p"))
    assert found(catalog, project_ids=("default",)) == ["s1"]
    assert found(catalog, project_ids=("p", "default")) == ["s2", "s1"]
    assert found(catalog, project_ids=()) == []


def test_owners_are_searched_among_what_is_within_reach(catalog: SessionCatalog) -> None:
    catalog.add(session(1, ALICE, project_id="team"))
    catalog.add(session(2, BOB, project_id="team"))
    catalog.add(session(3, BOB))
    assert found(catalog, ALICE, TEAM, owners=("bob",)) == ["s2"]
    assert found(catalog, ALICE, TEAM, owners=("alice",)) == ["s1"]
    assert found(catalog, ALICE, TEAM) == ["s2", "s1"]


def test_a_session_has_the_status_of_its_client_else_of_its_runs_else_of_its_heartbeat(
    catalog: SessionCatalog, database: Database
) -> None:
    for number in range(1, 6):
        catalog.add(session(number))
    catalog.add(session(6, created_at=START - timedelta(hours=1)))
    add_run(database, "s1", 0, "lost")
    catalog.finish("s1", "errored", "it broke")
    add_run(database, "s2", 0, "live")
    failed = add_run(database, "s2", 1, "failed")
    add_run(database, "s3", 0, "unloaded")
    catalog.finish("s4", "success", None)
    statuses = {summary.session.session_id: (summary.status, summary.failed_run) for summary in summaries(catalog)}
    assert statuses == {
        "s1": ("client_finished", None),
        "s2": ("failed", (failed.run_id, "failed")),
        "s3": ("active", None),
        "s4": ("client_finished", None),
        "s5": ("active", None),
        "s6": (None, None),
    }
    wanted = {
        ("s2",): (StatusFilter("failed"),),
        ("s5", "s3"): (StatusFilter("active"),),
        ("s4", "s1"): (StatusFilter("client_finished"),),
        ("s1",): (StatusFilter("client_finished", ("errored", "interrupted")),),
        ("s4", "s2"): (StatusFilter("failed"), StatusFilter("client_finished", ("success",))),
        (): (StatusFilter("cancelled"),),
    }
    for names, statuses_wanted in wanted.items():
        assert found(catalog, statuses=statuses_wanted) == list(names)
    catalog.heard(["s6"])
    assert "s6" in found(catalog, statuses=(StatusFilter("active"),))


def test_a_summary_counts_the_checkpoints_that_are_kept(catalog: SessionCatalog, database: Database) -> None:
    catalog.add(session(1))
    catalog.add(session(2))
    run = add_run(database, "s1", 0)
    for name, expires_at in (("a", None), ("b", START + timedelta(days=1)), ("c", START - timedelta(days=1))):
        path = CheckpointPath(run.run_id, "training", name)
        CheckpointCatalog(database).put(
            Checkpoint(path, ALICE.tenant_id, "m", LoraSpec(), name, 10, True, now(), expires_at, {})
        )
    newest, oldest = summaries(catalog)
    assert (newest.num_checkpoints, newest.checkpoint_bytes) == (0, 0)
    assert (oldest.num_checkpoints, oldest.checkpoint_bytes, oldest.owner) == (2, 20, ALICE)


def test_a_sessions_parts_are_listed_as_they_were_made(catalog: SessionCatalog, database: Database) -> None:
    catalog.add(session(1))
    runs = [add_run(database, "s1", number).run_id for number in range(3)]
    assert catalog.parts("s1") == (runs, [])


def test_a_session_moves_into_a_project_and_back(catalog: SessionCatalog) -> None:
    catalog.add(session(1))
    for project_id in ("p", None):
        catalog.assign("s1", project_id)
        assert catalog.session(ALICE, "s1") == session(1, project_id=project_id)
