"""The thread that writes the journal: what waits together is one transaction (a group commit), in the order given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from sqlalchemy.exc import IntegrityError

from tuft.errors import StorageError, UserError
from tuft.store.journal import Accepted, Journal, Note

_MAX_TOGETHER = 256
_RETRY_INTERVAL_S = 0.5
_log = logging.getLogger(__name__)

Done = Callable[[StorageError | None], None]


@dataclass(frozen=True, slots=True)
class _Item:
    make: Callable[[], Note]
    done: Done


class JournalWriter:
    """``done`` is called from this thread. A request that cannot be written is refused: its ``done`` gets the error.
    Everything else has happened already, so it is tried again until database and disk take it (space may return), and
    what is behind it keeps its place."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._inbox: SimpleQueue[_Item | None] = SimpleQueue()
        self._stuck: list[tuple[Note, Done]] = []
        self._thread = threading.Thread(target=self._serve, name="journal-writer", daemon=True)

    @property
    def num_stuck(self) -> int:
        """Notes that database or disk would not take yet."""
        return len(self._stuck)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, make: Callable[[], Note], done: Done) -> None:
        """Write what ``make`` returns; it is called from this thread, since encoding takes time."""
        self._inbox.put(_Item(make, done))

    def close(self) -> None:
        """Write what is waiting, once more if need be, and end."""
        self._inbox.put(None)
        self._thread.join()

    def _serve(self) -> None:
        is_open = True
        while is_open:
            batch, is_open = self._collect()
            notes = list(self._stuck)
            for item in batch:
                try:
                    notes.append((item.make(), item.done))
                except Exception as error:  # noqa: BLE001 (a bug concerns its own note, never the thread that all need)
                    _log.exception("a note cannot be made")
                    item.done(StorageError(f"this cannot be journaled: {type(error).__name__}"))
            self._write(notes)

    def _collect(self) -> tuple[list[_Item], bool]:
        batch: list[_Item] = []
        try:
            item = self._inbox.get(timeout=_RETRY_INTERVAL_S if self._stuck else None)
            while item is not None:
                batch.append(item)
                if len(batch) == _MAX_TOGETHER:
                    return batch, True
                item = self._inbox.get_nowait()
        except Empty:
            return batch, True
        return batch, False

    def _write(self, notes: list[tuple[Note, Done]]) -> None:
        self._stuck = []
        try:
            self._journal.write([note for note, _ in notes])
        except (StorageError, IntegrityError, UserError):
            for note, done in notes:
                self._write_alone(note, done)
        else:
            for _, done in notes:
                done(None)

    def _write_alone(self, note: Note, done: Done) -> None:
        may_wait = not isinstance(note, Accepted)
        if may_wait and self._stuck:
            self._stuck.append((note, done))
            return
        try:
            self._journal.write([note])
        except IntegrityError as error:  # its tenant or run is gone, or another process accepted the same request
            _log.error("the journal refuses a note: %s", error.orig)
            done(StorageError("the database refused: a row that this one needs is gone, or it is there already"))
        except UserError as error:  # what no database can hold
            _log.error("the journal refuses a note: %s", error)
            done(StorageError(str(error)))
        except StorageError as error:
            if may_wait:
                self._stuck.append((note, done))
            else:
                done(error)
        else:
            done(None)
