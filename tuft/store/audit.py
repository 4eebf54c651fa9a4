"""The rows of the audit log."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, or_, select

from tuft.records import AuditEntry
from tuft.store import tables
from tuft.store.db import Database


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What is to be written, once for each tenant that it concerns."""

    tenant_ids: frozenset[str]
    at: datetime
    event: str
    details: Mapping[str, str | int | None]

    def write(self, connection: Connection) -> None:
        """In the transaction of the change that it tells of: there is neither without the other."""
        rows = [
            {"tenant_id": tenant_id, "at": self.at, "event": self.event, "details": dict(self.details)}
            for tenant_id in self.tenant_ids
        ]
        connection.execute(insert(tables.audit_log), rows)


class AuditLog:
    """Entries are written once and never changed; age alone takes them away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, tenant_ids: Collection[str], at: datetime, event: str, details: Mapping[str, str | int | None]
    ) -> None:
        """The same entry for each of the tenants."""
        rows = [{"tenant_id": tenant, "at": at, "event": event, "details": dict(details)} for tenant in tenant_ids]
        with self._database.transaction() as connection:
            connection.execute(insert(tables.audit_log), rows)

    def newest(
        self,
        tenant_id: str | None,
        resources: Sequence[str] | None,
        since: datetime,
        until: datetime,
        limit: int,
        hidden: Collection[str] = (),
    ) -> tuple[list[AuditEntry], int]:
        """The newest entries of that time, of the tenant (None: of all) and about these resources (None: about any)
        but for ``hidden`` events, oldest first, and the number of all."""
        table = tables.audit_log
        query = select(table, tables.tenants.c.name).join(tables.tenants).where(table.c.at >= since, table.c.at < until)
        query = query.where(table.c.event.not_in(hidden))
        if tenant_id is not None:
            query = query.where(table.c.tenant_id == tenant_id)
        if resources is not None:
            query = query.where(or_(*(table.c.event.startswith(f"{name}_", autoescape=True) for name in resources)))
        with self._database.transaction() as connection:
            total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
            rows = connection.execute(query.order_by(table.c.at.desc(), table.c.entry_id.desc()).limit(limit)).all()
        return [AuditEntry(row.at, row.event, row.details, row.name) for row in reversed(rows)], total

    def delete_before(self, moment: datetime) -> None:
        with self._database.transaction() as connection:
            connection.execute(delete(tables.audit_log).where(tables.audit_log.c.at < moment))
