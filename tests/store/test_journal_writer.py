from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store.test_journal import ALICE, RUN, accepted, settled
from tuft.errors import StorageError
from tuft.records import FutureKey
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.journal import Journal, Note
from tuft.store.journal_writer import JournalWriter
from tuft.store.spool import INLINE_BYTES, Spool
from tuft.store.tenants import TenantCatalog

LARGE = b"x" * (INLINE_BYTES + 1)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(sqlite_url(tmp_path))
    TenantCatalog(opened).ensure_tenant(ALICE)
    yield opened
    opened.close()


@pytest.fixture
def journal(database: Database, tmp_path: Path) -> Journal:
    return Journal(database, Spool(tmp_path / "journal"))


@pytest.fixture
def writer(journal: Journal) -> Iterator[JournalWriter]:
    running = JournalWriter(journal)
    running.start()
    yield running
    if running.is_running:
        running.close()


def write(writer: JournalWriter, *notes: Note) -> list[StorageError | None]:
    """What each was answered with, once all are."""
    told: list[StorageError | None] = []
    ready = threading.Event()

    def done(error: StorageError | None) -> None:
        told.append(error)
        if len(told) == len(notes):
            ready.set()

    for note in notes:
        writer.submit(lambda note=note: note, done)  # type: ignore[misc]
    assert ready.wait(20)
    return told


def block(tmp_path: Path) -> Callable[[], None]:
    """A disk that takes no files, until the function returned is called."""
    for number in range(256):
        place = tmp_path / "journal" / f"{number:02x}"
        place.parent.mkdir(exist_ok=True)
        place.write_text("")

    def free() -> None:
        for file in (tmp_path / "journal").iterdir():
            if file.is_file():
                file.unlink()

    return free


def test_notes_are_written_in_order_and_each_is_answered(writer: JournalWriter, journal: Journal) -> None:
    assert write(writer, *(note for seq in range(300) for note in (accepted(seq), settled(seq)))) == [None] * 600
    assert journal.pending() == []
    assert len(journal.of_run(RUN, -1)) == 300


def test_a_request_that_cannot_be_written_is_refused_and_others_are_taken(
    writer: JournalWriter, journal: Journal, tmp_path: Path
) -> None:
    free = block(tmp_path)
    refused, taken = write(writer, accepted(1, LARGE), accepted(2))
    assert isinstance(refused, StorageError)
    assert taken is None
    free()
    assert write(writer, accepted(1, LARGE)) == [None], "the same again, once there is room"


def test_a_result_waits_until_there_is_room_and_those_behind_keep_their_order(
    writer: JournalWriter, journal: Journal, tmp_path: Path
) -> None:
    write(writer, accepted(1), accepted(2))
    free = block(tmp_path)
    order: list[int] = []
    all_done = threading.Event()
    for seq, result in ((1, LARGE), (2, b"small")):

        def done(error: StorageError | None, seq: int = seq) -> None:
            assert error is None
            order.append(seq)
            if len(order) == 2:
                all_done.set()

        writer.submit(lambda seq=seq, result=result: settled(seq, result), done)  # type: ignore[misc]
    assert write(writer, accepted(3)) == [None], "what can be written need not wait"
    assert order == []
    free()
    assert all_done.wait(20)
    assert order == [1, 2]
    assert [future.key.seq for future in journal.pending()] == [3]


def test_the_same_request_from_another_process_is_refused(writer: JournalWriter, journal: Journal) -> None:
    journal.write([accepted(1)])
    (refused,) = write(writer, accepted(1))
    assert isinstance(refused, StorageError)
    assert journal.find(FutureKey("operation", RUN, 1)) is not None


def test_closing_writes_what_waits(writer: JournalWriter, journal: Journal) -> None:
    for seq in range(50):
        writer.submit(lambda seq=seq: accepted(seq), lambda _: None)  # type: ignore[misc]
    writer.close()
    assert len(journal.pending()) == 50
