"""On SQLite and PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from tuft.metering import UsageKey
from tuft.records import FutureKey, JournaledFuture, Outcome, Run, Session, Snapshot, Tenant, now
from tuft.store.catalog import Catalog
from tuft.store.db import Database, open_database
from tuft.store.journal import Accepted, Journal, Settled, Snapshotted
from tuft.store.sessions import SessionCatalog
from tuft.store.spool import INLINE_BYTES, Spool
from tuft.store.tenants import TenantCatalog
from tuft.store.usage import UsageTable
from tuft.types import LoraSpec

ALICE = Tenant("tenant-a", "alice")
LARGE = b"x" * (INLINE_BYTES + 1)
RUN = "session:train:0"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    TenantCatalog(opened).ensure_tenant(ALICE)
    moment = now()
    SessionCatalog(opened).add(Session("session", ALICE.tenant_id, moment, (), {}, "", None))
    run = Run(RUN, ALICE.tenant_id, "session", 0, "model", LoraSpec(), "live", moment, moment, {})
    Catalog(opened).add_run(run)
    yield opened
    opened.close()


@pytest.fixture
def journal(database: Database, tmp_path: Path) -> Journal:
    return Journal(database, Spool(tmp_path / "journal"))


def accepted(seq: int, request: bytes = b"request", name: str = "forward_backward") -> Accepted:
    key = FutureKey("operation", RUN, seq)
    future = JournaledFuture(f"future-{seq:02}", ALICE.tenant_id, 7, key, name, "digest", 3, len(request), now())
    return Accepted(future, request)


def settled(seq: int, result: bytes = b"result", outcome: Outcome = "ok", forget_at_s: float = 10.0) -> Settled:
    return Settled(f"future-{seq:02}", outcome, result, forget_at_s)


def test_a_request_is_found_by_its_key_with_what_was_asked(journal: Journal) -> None:
    journal.write([accepted(1), accepted(2, LARGE)])
    found = journal.find(FutureKey("operation", RUN, 2))
    assert found is not None
    assert (found.future_id, found.key_number, found.num_rows, found.outcome) == ("future-02", 7, 3, None)
    assert journal.content("future-01", "request") == b"request"
    assert journal.content("future-02", "request") == LARGE
    assert [future.key.seq for future in journal.pending()] == [1, 2]


def test_a_key_is_accepted_once(journal: Journal, tmp_path: Path) -> None:
    journal.write([accepted(1, LARGE)])
    again = accepted(1, LARGE + b"y")
    other_id = Accepted(JournaledFuture(**{**_fields(again.future), "future_id": "future-77"}), again.request)
    with pytest.raises(IntegrityError):
        journal.write([accepted(2), other_id])
    assert journal.find(FutureKey("operation", RUN, 2)) is None, "all of a call, or none"
    assert journal.content("future-01", "request") == LARGE
    assert Spool(tmp_path / "journal").names() == {("future-01", "request")}


def _fields(future: JournaledFuture) -> dict[str, object]:
    return {name: getattr(future, name) for name in JournaledFuture.__dataclass_fields__}


def test_a_result_is_kept_with_what_it_used_once(journal: Journal, database: Database) -> None:
    key = UsageKey(ALICE.tenant_id, now().replace(minute=0, second=0, microsecond=0), "session", "model", "training")
    note = Settled("future-01", "ok", LARGE, 10.0, {key: 5})
    journal.write([accepted(1), note])
    journal.write([note])  # a writer that did not hear that it had written
    found = journal.future("future-01")
    assert found is not None
    assert (found.outcome, found.result_bytes) == ("ok", len(LARGE))
    assert journal.content("future-01", "result") == LARGE
    (row,) = UsageTable(database).between(ALICE.tenant_id, key.hour, now(), 10)
    assert row.quantity == 5


def test_results_are_forgotten_in_their_time_and_operations_stay_for_replay(journal: Journal) -> None:
    journal.write([accepted(0), settled(0), accepted(1, LARGE), settled(1, LARGE, forget_at_s=20.0), accepted(2)])
    journal.forget_at(["future-01"], 30.0)  # not longer than it was to be kept
    assert journal.forget_results(15.0, 100) == ["future-00"]
    assert journal.forget_results(25.0, 100) == ["future-01"]
    assert journal.prune(100) == 0, "the run may need them"
    assert [future.result_bytes for future in journal.of_run(RUN, -1)] == [None, None, None]
    assert journal.content("future-01", "request") == LARGE
    journal.write([Snapshotted(Snapshot(RUN, 1, "directory", 5, "digest"))])
    assert journal.prune(100) == 2
    assert [future.key.seq for future in journal.of_run(RUN, -1)] == [2]


def test_what_changes_no_run_goes_with_its_result_but_for_the_last_which_says_where_the_run_goes_on(
    journal: Journal,
) -> None:
    forwards = [note for seq in (1, 2, 4, 6) for note in (accepted(seq, name="forward"), settled(seq))]
    failed = [accepted(3), settled(3, outcome="failed")]
    changing = [accepted(0, name="create_model"), settled(0), accepted(5), settled(5)]
    journal.write([*changing, *forwards, *failed, accepted(7, name="forward")])
    assert journal.forget_results(15.0, 100)
    assert journal.prune(100) == 4
    assert [future.key.seq for future in journal.of_run(RUN, -1)] == [0, 5, 6, 7]
    assert journal.position(RUN) == (7, True)


def test_the_operations_of_a_run_that_has_ended_go_with_their_results(journal: Journal, database: Database) -> None:
    journal.write([accepted(0), settled(0)])
    journal.forget_results(15.0, 100)
    Catalog(database).set_run_status(RUN, "unloaded")
    assert journal.prune(100) == 1


def test_a_result_is_kept_shorter_once_it_was_delivered(journal: Journal) -> None:
    journal.write([accepted(0), settled(0, forget_at_s=1000.0)])
    journal.forget_at(["future-00"], 10.0)
    assert journal.forget_results(10.0, 100) == ["future-00"]


def test_a_newer_snapshot_replaces_the_older(journal: Journal) -> None:
    for seq in (4, 9):
        journal.write([Snapshotted(Snapshot(RUN, seq, f"at-{seq}", 5, "digest"))])
    assert journal.snapshot(RUN) == Snapshot(RUN, 9, "at-9", 5, "digest")
    assert journal.snapshot_directories() == {"at-9"}
    assert journal.drop_snapshot(RUN) == "at-9"
    assert journal.drop_snapshot(RUN) is journal.snapshot(RUN) is None


@pytest.mark.parametrize(
    ("ended", "snapshot_seq", "position"),
    [
        ((), None, (0, False)),
        (((0, "failed"),), None, (1, False)),
        (((0, "ok"), (1, "ok"), (2, "failed")), None, (3, True)),
        (((0, "ok"),), 5, (6, True)),
        (((7, "ok"),), 5, (8, True)),
    ],
)
def test_where_a_run_stands_is_known_from_what_has_ended(
    journal: Journal, ended: tuple[tuple[int, Outcome], ...], snapshot_seq: int | None, position: tuple[int, bool]
) -> None:
    for seq, outcome in ended:
        journal.write([accepted(seq), settled(seq, outcome=outcome)])
    if snapshot_seq is not None:
        journal.write([Snapshotted(Snapshot(RUN, snapshot_seq, "directory", 5, "digest"))])
    assert journal.position(RUN) == position


def test_files_without_a_row_are_swept(journal: Journal, tmp_path: Path) -> None:
    journal.write([accepted(1, LARGE)])
    Spool(tmp_path / "journal").write("future-99", "request", LARGE)
    assert journal.sweep_files() == 1
    assert journal.content("future-01", "request") == LARGE


def test_the_uptime_is_kept(journal: Journal) -> None:
    assert journal.uptime_s() == 0.0
    for uptime_s in (3.5, 7.25):
        journal.keep_time(uptime_s)
        assert journal.uptime_s() == uptime_s
