"""The ledger: what was used, by the hour, tenant, key and purpose. And what checkpoints hold now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tuft.config import DEFAULT_PROJECT
from tuft.metering import UsageKey, UsageRow
from tuft.records import CheckpointStorage, Shared, Tenant, now
from tuft.store import tables
from tuft.store.db import Database
from tuft.store.ownership import own, within_reach

FOLDED = datetime(1970, 1, 1, tzinfo=UTC)
"""The hour of what is too old to be told by the hour."""
_UPSERTS: Mapping[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def add_usage(connection: Connection, increments: Mapping[UsageKey, int]) -> None:
    """Add to what the ledger holds, within the caller's transaction."""
    table = tables.ledger
    upsert = _UPSERTS.get(connection.dialect.name)
    for key, quantity in increments.items():
        named = and_(*(table.c[name] == value for name, value in key._asdict().items()))
        more = {"quantity": table.c.quantity + quantity}
        if upsert is not None:
            row = upsert(table).values(**key._asdict(), quantity=quantity)
            connection.execute(row.on_conflict_do_update(index_elements=list(table.primary_key), set_=more))
        elif connection.execute(update(table).where(named).values(**more)).rowcount == 0:
            connection.execute(insert(table).values(**key._asdict(), quantity=quantity))


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What a tenant used of one kind by one key at one price."""

    tenant_id: str
    key_number: int
    base_model: str
    kind: str
    rate: int
    quantity: int
    day: date | None = None


class UsageTable:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, increments: Mapping[UsageKey, int]) -> None:
        """``add_usage`` in a transaction of its own."""
        if increments:
            with self._database.transaction() as connection:
                add_usage(connection, increments)

    def between(self, tenant_id: str, since: datetime, until: datetime, limit: int) -> list[UsageRow]:
        """The tenant's rows of these hours, at most ``limit``, by hour. Those of several keys are one."""
        table, sessions = tables.ledger, tables.sessions
        grouped = (table.c.hour, table.c.session_id, table.c.base_model, table.c.kind, table.c.rate)
        sums = (
            select(*grouped, func.sum(table.c.quantity).label("quantity"))
            .where(table.c.tenant_id == tenant_id, table.c.hour >= since, table.c.hour < until)
            .group_by(*grouped)
            .order_by(table.c.hour)
            .limit(limit)
            .subquery()
        )
        query = (
            select(sums, sessions.c.project_id, sessions.c.user_metadata)
            .outerjoin(sessions, sessions.c.session_id == sums.c.session_id)
            .order_by(sums.c.hour)
        )
        return [
            UsageRow(
                hour=row.hour,
                session_id=row.session_id or None,
                base_model=row.base_model,
                kind=row.kind,
                quantity=int(row.quantity),
                project_id=(row.project_id or DEFAULT_PROJECT) if row.session_id else None,
                user_metadata=row.user_metadata,
                rate=row.rate,
            )
            for row in self._database.all(query)
        ]

    def sums(self, since: datetime, tenant_id: str | None = None, until: datetime | None = None) -> list[UsageSum]:
        """What was used since then, of one tenant or of all. ``FOLDED`` is from the beginning."""
        return [
            UsageSum(row.tenant_id, row.key_number, row.base_model, row.kind, row.rate, int(row.quantity))
            for row in self._database.all(_sums(since, tenant_id, until))
        ]

    def daily_sums(
        self, since: datetime, tenant_id: str | None = None, until: datetime | None = None
    ) -> list[UsageSum]:
        """The same, day by day (UTC), oldest first."""
        table = tables.ledger
        found: dict[tuple[date, UsageSum], int] = {}
        query = _sums(since, tenant_id, until).add_columns(table.c.hour).group_by(table.c.hour)
        for row in self._database.all(query):
            key = UsageSum(row.tenant_id, row.key_number, row.base_model, row.kind, row.rate, 0)
            day = row.hour.date()
            found[day, key] = found.get((day, key), 0) + int(row.quantity)
        return [
            UsageSum(key.tenant_id, key.key_number, key.base_model, key.kind, key.rate, quantity, day)
            for (day, key), quantity in sorted(found.items(), key=lambda item: item[0][0])
        ]

    def fold_before(self, hour: datetime) -> None:
        """Add up what is older than ``hour``: its hours and sessions are forgotten, its sums are not."""
        table = tables.ledger
        old = and_(table.c.hour < hour, table.c.hour > FOLDED)
        kept = (table.c.tenant_id, table.c.base_model, table.c.kind, table.c.key_number, table.c.rate)
        sums = select(*kept, func.sum(table.c.quantity).label("quantity")).where(old).group_by(*kept)
        with self._database.transaction() as connection:
            rows = connection.execute(sums).all()
            folded = {
                UsageKey(row.tenant_id, FOLDED, "", row.base_model, row.kind, row.key_number, row.rate): int(
                    row.quantity
                )
                for row in rows
            }
            add_usage(connection, folded)
            connection.execute(delete(table).where(old))

    def stored_bytes(self) -> dict[tuple[str, str], int]:
        """Bytes of checkpoints, by tenant id and base model."""
        table = tables.checkpoints
        query = (
            select(table.c.tenant_id, table.c.base_model, func.sum(table.c.size_bytes).label("num_bytes"))
            .where(table.c.expires_at.is_(None) | (table.c.expires_at > now()))
            .group_by(table.c.tenant_id, table.c.base_model)
        )
        return {(row.tenant_id, row.base_model): int(row.num_bytes) for row in self._database.all(query)}

    def stored_bytes_of(self, tenant: Tenant) -> tuple[int, int]:
        """Bytes of the tenant's checkpoints, and of those among them whose runs the calling key began."""
        table, runs = tables.checkpoints, tables.runs
        num_bytes = func.coalesce(func.sum(table.c.size_bytes), 0)
        query = (
            select(num_bytes)
            .join(runs, runs.c.run_id == table.c.run_id)
            .where(own(table, tenant))
            .where(table.c.expires_at.is_(None) | (table.c.expires_at > now()))
        )
        of_all = self._database.first(query)
        of_key = self._database.first(query.where(runs.c.key_number == tenant.key_number))
        assert of_all is not None
        assert of_key is not None
        return int(of_all[0]), int(of_key[0])

    def storage(self, tenant: Tenant, shared: Shared, project_id: str | None) -> list[CheckpointStorage]:
        """What the checkpoints that the tenant may see hold now, in one project or all, by project and owner."""
        checkpoints, runs, sessions, tenants = tables.checkpoints, tables.runs, tables.sessions, tables.tenants
        whose = (sessions.c.project_id, tenants.c.tenant_id, tenants.c.name)
        query = (
            select(
                *whose,
                func.count().label("num_checkpoints"),
                func.sum(checkpoints.c.size_bytes).label("num_bytes"),
            )
            .select_from(checkpoints)
            .join(runs, runs.c.run_id == checkpoints.c.run_id)
            .join(sessions, sessions.c.session_id == runs.c.session_id)
            .join(tenants, tenants.c.tenant_id == sessions.c.tenant_id)
            .where(checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > now()))
            .where(within_reach(tenant, shared))
            .group_by(*whose)
            .order_by(sessions.c.project_id.nulls_first(), tenants.c.name)
        )
        if project_id is not None:
            query = query.where(func.coalesce(sessions.c.project_id, DEFAULT_PROJECT) == project_id)
        return [
            CheckpointStorage(
                project_id=row.project_id or DEFAULT_PROJECT,
                owner=Tenant(row.tenant_id, row.name),
                num_checkpoints=row.num_checkpoints,
                num_bytes=int(row.num_bytes),
            )
            for row in self._database.all(query)
        ]


def _sums(
    since: datetime, tenant_id: str | None, until: datetime | None
) -> Select[tuple[str, int, str, str, int, int]]:
    table = tables.ledger
    grouped = (table.c.tenant_id, table.c.key_number, table.c.base_model, table.c.kind, table.c.rate)
    query = select(*grouped, func.sum(table.c.quantity).label("quantity")).where(table.c.hour >= since)
    if tenant_id is not None:
        query = query.where(table.c.tenant_id == tenant_id)
    if until is not None:
        query = query.where(table.c.hour < until)
    return query.group_by(*grouped)
