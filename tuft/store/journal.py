"""The journal: every acknowledged request whose answer is a future, its result, and the newest snapshot of each run.

What is to be written comes as *notes*. Those of one call are one transaction, in their order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, bindparam, delete, insert, or_, select, update

from tuft.metering import Charge, UsageKey
from tuft.records import FutureKey, FutureKind, JournaledFuture, Outcome, Snapshot, now
from tuft.store.db import Database
from tuft.store.spool import INLINE_BYTES, Content, Spool
from tuft.store.tables import futures, runs, server_clock, snapshots
from tuft.store.usage import add_usage


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request is acknowledged once this is written."""

    future: JournaledFuture
    request: bytes


@dataclass(frozen=True, slots=True)
class Settled:
    """Its result, kept until ``forget_at_s``, and what it used, which is counted in the same transaction. It changes
    nothing if the future has been settled already."""

    future_id: str
    outcome: Outcome
    result: bytes
    forget_at_s: float
    usage: Mapping[UsageKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshotted:
    """The run's state up to ``snapshot.seq`` is on the disk."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Flushed:
    """Writes nothing: all that came before it is written."""


Note = Accepted | Settled | Snapshotted | Flushed


class Journal:
    """Rows and files. All of it raises StorageError when database or disk refuses."""

    def __init__(self, database: Database, spool: Spool) -> None:
        self._database = database
        self._spool = spool

    def write(self, notes: Sequence[Note]) -> None:
        """All of them, or none. Raises IntegrityError if a request of the same key was accepted before."""
        written: list[tuple[str, Content]] = []
        try:
            for note in notes:
                for future_id, content, value in _contents(note):
                    if len(value) > INLINE_BYTES:
                        self._spool.write(future_id, content, value)
                        written.append((future_id, content))
            with self._database.transaction() as connection:
                for note in notes:
                    _write(connection, note)
        except Exception:  # whatever it was: it goes on, and no file stays without its row
            for future_id, content in written:
                self._spool.delete(future_id, content)
            raise

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, key: FutureKey) -> JournaledFuture | None:
        return self._first(_OF_KEY, kind=key.kind, subject_id=key.subject_id, seq=key.seq)

    def future(self, future_id: str) -> JournaledFuture | None:
        return self._first(_OF_ID, future_id=future_id)

    def pending(self) -> list[JournaledFuture]:
        """What has no result yet, in the order in which it was accepted."""
        query = select(*_FUTURE).where(futures.c.outcome.is_(None))
        return self._all(query.order_by(futures.c.accepted_at, futures.c.seq))

    def of_run(self, run_id: str, after_seq: int) -> list[JournaledFuture]:
        """The run's operations behind ``after_seq``, in order."""
        query = select(*_FUTURE).where(futures.c.kind == "operation", futures.c.subject_id == run_id)
        return self._all(query.where(futures.c.seq > after_seq).order_by(futures.c.seq))

    def kept(self, kind: FutureKind) -> list[JournaledFuture]:
        """What is pending, or whose result is kept, of that kind."""
        query = select(*_FUTURE).where(futures.c.kind == kind)
        return self._all(query.where(futures.c.outcome.is_(None) | futures.c.result_bytes.is_not(None)))

    def content(self, future_id: str, content: Content) -> bytes:
        """Request or result, encoded. Raises StorageError if there is none."""
        row = self._database.first(select(futures.c[content]).where(futures.c.future_id == future_id))
        inline: bytes | None = None if row is None else row[0]
        return self._spool.read(future_id, content) if inline is None else inline

    def snapshot(self, run_id: str) -> Snapshot | None:
        row = self._database.first(select(snapshots).where(snapshots.c.run_id == run_id))
        return None if row is None else Snapshot(row.run_id, row.seq, row.directory, row.size_bytes, row.digest)

    def position(self, run_id: str) -> tuple[int, bool]:
        """The seq behind all that ended, and whether the run's beginning is among that."""
        snapshot = self.snapshot(run_id)
        first = -1 if snapshot is None else snapshot.seq
        ended = [future for future in self.of_run(run_id, first) if future.outcome is not None]
        is_begun = snapshot is not None or any(future.key.seq == 0 and future.outcome == "ok" for future in ended)
        return max([first, *(future.key.seq for future in ended)]) + 1, is_begun

    def snapshot_directories(self) -> set[str]:
        return {row.directory for row in self._database.all(select(snapshots.c.directory))}

    def uptime_s(self) -> float:
        """How long servers of this home have run until the last ``keep_time``."""
        row = self._database.first(select(server_clock))
        return 0.0 if row is None else float(row.uptime_s)

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def keep_time(self, uptime_s: float) -> None:
        with self._database.transaction() as connection:
            if connection.execute(update(server_clock).values(uptime_s=uptime_s)).rowcount == 0:
                connection.execute(insert(server_clock).values(uptime_s=uptime_s))

    def forget_at(self, future_ids: Collection[str], forget_at_s: float) -> None:
        """Keep their results until then, if they were to be kept longer."""
        statement = (
            update(futures)
            .where(futures.c.future_id == bindparam("given"), futures.c.forget_at_s > forget_at_s)
            .values(forget_at_s=forget_at_s)
        )
        with self._database.transaction() as connection:
            connection.execute(statement, [{"given": future_id} for future_id in future_ids])

    def forget_results(self, uptime_s: float, limit: int) -> list[str]:
        """Results whose time has come, at most ``limit`` of them, are no longer kept. Returns their futures."""
        due = select(futures.c.future_id).where(futures.c.forget_at_s <= uptime_s, futures.c.result_bytes.is_not(None))
        with self._database.transaction() as connection:
            ids = list(connection.execute(due.limit(limit)).scalars())
            _each(connection, update(futures).values(result=None, result_bytes=None, forget_at_s=None), ids)
        for future_id in ids:
            self._spool.delete(future_id, "result")
        return ids

    def prune(self, limit: int) -> int:
        """Delete futures whose results are no longer kept and whose requests nobody needs: all but those operations of
        live runs that are computed again and that no snapshot covers, and the last of each run, which says where it
        goes on. Returns how many, at most ``limit``."""
        table, snapshot, later = futures.c, snapshots.c, futures.alias("later").c
        covered = select(snapshot.run_id).where(snapshot.run_id == table.subject_id, snapshot.seq >= table.seq)
        live = select(runs.c.run_id).where(runs.c.run_id == table.subject_id, _IS_OPEN)
        followed = select(later.future_id).where(
            later.kind == table.kind,
            later.subject_id == table.subject_id,
            later.seq > table.seq,
            later.outcome.is_not(None),
        )
        changed = and_(table.name.in_(REPLAYED), table.outcome.in_(("ok", "spent")))
        is_needed = and_(
            table.kind == "operation",
            ~covered.exists(),
            live.exists(),
            or_(table.seq == 0, changed, ~followed.exists()),
        )
        query = select(table.future_id).where(table.outcome.is_not(None), table.result_bytes.is_(None), ~is_needed)
        with self._database.transaction() as connection:
            ids = list(connection.execute(query.limit(limit)).scalars())
            _each(connection, delete(futures), ids)
        for future_id in ids:
            self._spool.delete(future_id, "request")
        return len(ids)

    def drop_snapshot(self, run_id: str) -> str | None:
        """The run has ended. Returns the directory of its snapshot, if it had one."""
        named = snapshots.c.run_id == run_id
        with self._database.transaction() as connection:
            directory = connection.execute(select(snapshots.c.directory).where(named)).scalar_one_or_none()
            connection.execute(delete(snapshots).where(named))
        return directory

    def drop_ended_snapshots(self) -> None:
        """Those of runs that ended while they were being written."""
        with self._database.transaction() as connection:
            connection.execute(
                delete(snapshots).where(snapshots.c.run_id.not_in(select(runs.c.run_id).where(_IS_OPEN)))
            )

    def sweep_files(self) -> int:
        """Delete files that no row names: their writer died. Only while nothing is being written."""
        with self._database.transaction() as connection:
            known = set(connection.execute(select(futures.c.future_id)).scalars())
        orphans = [(future_id, content) for future_id, content in self._spool.names() if future_id not in known]
        for future_id, content in orphans:
            self._spool.delete(future_id, "request" if content == "request" else "result")
        return len(orphans)

    def _first(self, query: Select[Any], **named: Any) -> JournaledFuture | None:
        row = self._database.first(query, **named)
        return None if row is None else _future(row)

    def _all(self, query: Select[Any]) -> list[JournaledFuture]:
        return [_future(row) for row in self._database.all(query)]


REPLAYED = ("forward_backward", "optim_step")
"""Names of the operations that change a run's state and are computed again. A load is followed by a snapshot."""
_IS_OPEN = runs.c.status.in_(("creating", "live"))
_FUTURE = tuple(column for column in futures.c if column.name not in ("request", "result"))
# built once: for every request, building one takes as long as asking the database
_OF_ID = select(*_FUTURE).where(futures.c.future_id == bindparam("future_id"))
_OF_KEY = select(*_FUTURE).where(
    futures.c.kind == bindparam("kind"),
    futures.c.subject_id == bindparam("subject_id"),
    futures.c.seq == bindparam("seq"),
)


def _future(row: Row[Any]) -> JournaledFuture:
    return JournaledFuture(
        future_id=row.future_id,
        tenant_id=row.tenant_id,
        key_number=row.key_number,
        key=FutureKey(row.kind, row.subject_id, row.seq),
        name=row.name,
        digest=row.digest,
        num_rows=row.num_rows,
        request_bytes=row.request_bytes,
        accepted_at=row.accepted_at,
        charge=Charge(**row.charge),
        outcome=row.outcome,
        result_bytes=row.result_bytes,
    )


def _contents(note: Note) -> Iterator[tuple[str, Content, bytes]]:
    if isinstance(note, Accepted):
        yield note.future.future_id, "request", note.request
    elif isinstance(note, Settled):
        yield note.future_id, "result", note.result


def _write(connection: Connection, note: Note) -> None:
    match note:
        case Accepted(future, request):
            values = {
                "future_id": future.future_id,
                "tenant_id": future.tenant_id,
                "key_number": future.key_number,
                "kind": future.key.kind,
                "subject_id": future.key.subject_id,
                "seq": future.key.seq,
                "name": future.name,
                "digest": future.digest,
                "num_rows": future.num_rows,
                "request_bytes": len(request),
                "request": _inline(request),
                "accepted_at": future.accepted_at,
                "charge": asdict(future.charge),
            }
            connection.execute(insert(futures).values(**values))
        case Settled(future_id, outcome, result, forget_at_s, usage):
            open_one = (futures.c.future_id == future_id, futures.c.outcome.is_(None))
            values = {
                "outcome": outcome,
                "settled_at": now(),
                "result_bytes": len(result),
                "result": _inline(result),
                "forget_at_s": forget_at_s,
            }
            if connection.execute(update(futures).where(*open_one).values(**values)).rowcount:
                add_usage(connection, usage)
        case Flushed():
            pass
        case Snapshotted(snapshot):
            values = {
                "seq": snapshot.seq,
                "directory": snapshot.directory,
                "size_bytes": snapshot.size_bytes,
                "digest": snapshot.digest,
                "created_at": now(),
            }
            changed = connection.execute(
                update(snapshots).where(snapshots.c.run_id == snapshot.run_id).values(**values)
            )
            if changed.rowcount == 0:
                connection.execute(insert(snapshots).values(run_id=snapshot.run_id, **values))


def _inline(content: bytes) -> bytes | None:
    return content if len(content) <= INLINE_BYTES else None


def _each(connection: Connection, statement: Any, future_ids: Sequence[str]) -> None:
    if future_ids:
        named = statement.where(futures.c.future_id == bindparam("given"))
        connection.execute(named, [{"given": future_id} for future_id in future_ids])
