"""The rows of usage, an hour each, and what checkpoints hold now."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import and_, delete, func, insert, select, update

from tuft.config import DEFAULT_PROJECT
from tuft.records import CheckpointStorage, Shared, Tenant, UsageKey, UsageRow, now
from tuft.store import tables
from tuft.store.db import Database
from tuft.store.sessions import within_reach


class UsageTable:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, quantities: Mapping[UsageKey, int]) -> None:
        """Add to what the rows hold, in one transaction."""
        table = tables.usage
        with self._database.transaction() as connection:
            for key, quantity in quantities.items():
                named = and_(*(table.c[name] == value for name, value in key._asdict().items()))
                changed = connection.execute(update(table).where(named).values(quantity=table.c.quantity + quantity))
                if changed.rowcount == 0:
                    connection.execute(insert(table).values(**key._asdict(), quantity=quantity))

    def between(self, tenant_id: str, since: datetime, until: datetime, limit: int) -> list[UsageRow]:
        """The tenant's rows of these hours, at most ``limit``, by hour."""
        table, sessions = tables.usage, tables.sessions
        query = (
            select(table, sessions.c.project_id, sessions.c.user_metadata)
            .outerjoin(sessions, sessions.c.session_id == table.c.session_id)
            .where(table.c.tenant_id == tenant_id, table.c.hour >= since, table.c.hour < until)
            .order_by(table.c.hour)
            .limit(limit)
        )
        return [
            UsageRow(
                hour=row.hour,
                session_id=row.session_id or None,
                base_model=row.base_model,
                kind=row.kind,
                quantity=row.quantity,
                project_id=(row.project_id or DEFAULT_PROJECT) if row.session_id else None,
                user_metadata=row.user_metadata,
            )
            for row in self._database.all(query)
        ]

    def delete_before(self, hour: datetime) -> None:
        with self._database.transaction() as connection:
            connection.execute(delete(tables.usage).where(tables.usage.c.hour < hour))

    def stored_bytes(self) -> dict[tuple[str, str], int]:
        """Bytes of checkpoints, by tenant id and base model."""
        table = tables.checkpoints
        query = (
            select(table.c.tenant_id, table.c.base_model, func.sum(table.c.size_bytes).label("num_bytes"))
            .where(table.c.expires_at.is_(None) | (table.c.expires_at > now()))
            .group_by(table.c.tenant_id, table.c.base_model)
        )
        return {(row.tenant_id, row.base_model): int(row.num_bytes) for row in self._database.all(query)}

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
            .order_by(sessions.c.project_id, tenants.c.name)
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
