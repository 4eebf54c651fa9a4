"""The rows of sessions, whose project decides who else may see what was made in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, case, exists, func, or_, select, update

from tuft.config import DEFAULT_PROJECT
from tuft.records import Session, SessionSearch, SessionSummary, Shared, StatusFilter, Tenant, now
from tuft.store import tables
from tuft.store.db import Database
from tuft.store.ownership import within_reach

_LISTED = 10_000  # runs, and samplers, that are named with a session: the newest


class SessionCatalog:
    """Rows in, records out. Raises StorageError when the database refuses. Without ``shared`` only the tenant's own
    sessions are found."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, session: Session) -> None:
        self._database.insert(
            tables.sessions,
            session_id=session.session_id,
            tenant_id=session.tenant_id,
            created_at=session.created_at,
            tags=list(session.tags),
            user_metadata=dict(session.user_metadata),
            sdk_version=session.sdk_version,
            display_name=session.display_name,
            project_id=session.project_id,
            heard_at=session.created_at,
        )

    def session(self, tenant: Tenant, session_id: str, shared: Shared | None = None) -> Session | None:
        table = tables.sessions
        query = select(table).where(table.c.session_id == session_id, within_reach(tenant, shared or {}))
        row = self._database.first(query)
        return None if row is None else _session(row)

    def get(self, session_id: str) -> Session | None:
        """Whoever owns it."""
        row = self._database.first(select(tables.sessions).where(tables.sessions.c.session_id == session_id))
        return None if row is None else _session(row)

    def page(self, tenant: Tenant, limit: int, offset: int, shared: Shared) -> tuple[list[Session], int]:
        """Newest first, and the number of all."""
        table = tables.sessions
        query = select(table).where(within_reach(tenant, shared)).order_by(*_newest_first())
        rows, total = self._database.page(query, limit, offset)
        return [_session(row) for row in rows], total

    def parts(self, session_id: str) -> tuple[list[str], list[str]]:
        """Ids of the session's runs and of its samplers, in the order in which they were made."""
        found = []
        for table, column in ((tables.runs, "run_id"), (tables.samplers, "sampler_id")):
            query = select(table.c[column]).where(table.c.session_id == session_id)
            rows = self._database.all(query.order_by(table.c.created_at.desc()).limit(_LISTED))
            found.append([str(row[0]) for row in reversed(rows)])
        return found[0], found[1]

    def finish(self, session_id: str, reason: str, detail: str | None) -> bool:
        """The first reason wins: False if there is one."""
        table = tables.sessions
        with self._database.transaction() as connection:
            changed = connection.execute(
                update(table)
                .where(table.c.session_id == session_id, table.c.finish_reason.is_(None))
                .values(finish_reason=reason, finish_detail=detail)
            )
        return changed.rowcount > 0

    def assign(self, session_id: str, project_id: str | None) -> None:
        table = tables.sessions
        with self._database.transaction() as connection:
            connection.execute(update(table).where(table.c.session_id == session_id).values(project_id=project_id))

    def heard(self, session_ids: Sequence[str]) -> None:
        """Note that their clients were there a moment ago."""
        table = tables.sessions
        moment = now()
        with self._database.transaction() as connection:
            for session_id in session_ids:
                connection.execute(update(table).where(table.c.session_id == session_id).values(heard_at=moment))

    def search(
        self, tenant: Tenant, shared: Shared, search: SessionSearch, heard_since: datetime
    ) -> tuple[list[SessionSummary], tuple[datetime, str] | None]:
        """One page, newest first, and where the next begins, if there is more."""
        table, failed = tables.sessions, tables.runs.alias("failed")
        status = _status(failed.c.run_id, heard_since)
        first_failed = (
            select(func.min(tables.runs.c.run_id))
            .where(tables.runs.c.session_id == table.c.session_id, tables.runs.c.status.in_(("failed", "lost")))
            .scalar_subquery()
        )
        query = (
            select(
                table,
                tables.tenants.c.name,
                status.label("status"),
                failed.c.run_id,
                failed.c.status.label("run_status"),
            )
            .join(tables.tenants, tables.tenants.c.tenant_id == table.c.tenant_id)
            .outerjoin(failed, failed.c.run_id == first_failed)
            .where(
                within_reach(tenant, shared),
                *_filters(self._database, search),
                self._has_metadata(search.user_metadata),
            )
        )
        if search.statuses is not None:
            query = query.where(or_(*(_of_status(status, wanted) for wanted in search.statuses)))
        rows = self._database.all(query.order_by(*_newest_first()).limit(search.limit + 1))
        page = rows[: search.limit]
        stored = self._checkpoints([row.session_id for row in page])
        summaries = [_summary(row, *stored.get(row.session_id, (0, 0))) for row in page]
        more = len(rows) > len(page)
        return summaries, (page[-1].created_at, page[-1].session_id) if more else None

    def _has_metadata(self, pairs: Mapping[str, str]) -> ColumnElement[bool]:
        is_sqlite = self._database.engine.dialect.name == "sqlite"
        each = func.json_each if is_sqlite else func.json_each_text
        held: list[ColumnElement[bool]] = []
        for number, (key, value) in enumerate(pairs.items()):
            pair = each(tables.sessions.c.user_metadata).table_valued("key", "value").alias(f"pair{number}")
            held.append(exists(select(1).select_from(pair).where(pair.c.key == key, pair.c.value == value)))
        return and_(True, *held)

    def _checkpoints(self, session_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Of each session: how many checkpoints of its runs are kept, and their bytes."""
        runs, checkpoints = tables.runs, tables.checkpoints
        query = (
            select(
                runs.c.session_id,
                func.count().label("num_checkpoints"),
                func.sum(checkpoints.c.size_bytes).label("num_bytes"),
            )
            .join(checkpoints, checkpoints.c.run_id == runs.c.run_id)
            .where(runs.c.session_id.in_(session_ids))
            .where(checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > now()))
            .group_by(runs.c.session_id)
        )
        rows = self._database.all(query)
        return {row.session_id: (row.num_checkpoints, int(row.num_bytes)) for row in rows}


def _newest_first() -> tuple[ColumnElement[Any], ...]:
    return tables.sessions.c.created_at.desc(), tables.sessions.c.session_id.desc()


def _status(failed_run_id: ColumnElement[Any], heard_since: datetime) -> ColumnElement[Any]:
    """What a client said last counts for more than what became of its runs."""
    table = tables.sessions
    return case(
        (table.c.finish_reason.is_not(None), "client_finished"),
        (failed_run_id.is_not(None), "failed"),
        (table.c.heard_at >= heard_since, "active"),
        else_=None,
    )


def _of_status(status: ColumnElement[Any], wanted: StatusFilter) -> ColumnElement[bool]:
    if wanted.reasons is None:
        return status == wanted.status
    return and_(status == wanted.status, tables.sessions.c.finish_reason.in_(wanted.reasons))


def _filters(database: Database, search: SessionSearch) -> list[ColumnElement[bool]]:
    table = tables.sessions
    filters: list[ColumnElement[bool]] = []
    either: list[ColumnElement[bool]] = []
    if search.session_id is not None:
        either.append(table.c.session_id == search.session_id)
    if search.name_words:
        name = database.lower(table.c.display_name)
        either.append(and_(*(name.contains(word.lower(), autoescape=True) for word in search.name_words)))
    if either:
        filters.append(or_(*either))
    if search.project_ids is not None:
        filters.append(func.coalesce(table.c.project_id, DEFAULT_PROJECT).in_(search.project_ids))
    if search.owners is not None:
        filters.append(tables.tenants.c.name.in_(search.owners))
    if search.after is not None:
        moment, session_id = search.after
        tied = and_(table.c.created_at == moment, table.c.session_id < session_id)
        filters.append(or_(table.c.created_at < moment, tied))
    return filters


def _session(row: Row[Any]) -> Session:
    return Session(
        session_id=row.session_id,
        tenant_id=row.tenant_id,
        created_at=row.created_at,
        tags=tuple(row.tags),
        user_metadata=row.user_metadata,
        sdk_version=row.sdk_version,
        display_name=row.display_name,
        project_id=row.project_id,
        finish_reason=row.finish_reason,
        finish_detail=row.finish_detail,
    )


def _summary(row: Row[Any], num_checkpoints: int, checkpoint_bytes: int) -> SessionSummary:
    failed_run = (row.run_id, row.run_status) if row.status == "failed" else None
    owner = Tenant(row.tenant_id, row.name)
    return SessionSummary(_session(row), owner, row.status, failed_run, num_checkpoints, checkpoint_bytes)
