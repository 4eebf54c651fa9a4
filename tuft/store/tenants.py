"""The rows of tenants and of their API keys."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from tuft.config import Scope
from tuft.records import ApiKey, Tenant, TenantSummary, now
from tuft.store import tables
from tuft.store.audit import NewEntry
from tuft.store.db import Database


class TenantCatalog:
    """Rows in, records out. Every change is written together with its ``entry`` of the audit log, if there is one.
    Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ensure_tenant(self, tenant: Tenant, entry: NewEntry | None = None) -> tuple[Tenant, bool]:
        """The tenant of that name, made from ``tenant`` if there is none; and whether it was made."""
        known = self.named(tenant.name)
        if known is not None:
            return known, False
        try:
            with self._database.transaction() as connection:
                values = {"tenant_id": tenant.tenant_id, "name": tenant.name, "created_at": now()}
                connection.execute(insert(tables.tenants).values(values))
                _tell(connection, entry)
        except IntegrityError:  # another process was faster: `tuft key create` beside the server
            known = self.named(tenant.name)
            if known is None:
                raise
            return known, False
        return tenant, True

    def named(self, name: str) -> Tenant | None:
        row = self._database.first(select(tables.tenants).where(tables.tenants.c.name == name))
        return None if row is None else Tenant(row.tenant_id, row.name)

    def tenants(self, limit: int, offset: int) -> tuple[list[TenantSummary], int]:
        """One page by name, and the number of all."""
        table, keys = tables.tenants, tables.api_keys
        valid = select(func.count()).where(keys.c.tenant_id == table.c.tenant_id, _opens(now()))
        query = select(table, valid.scalar_subquery().label("num_keys")).order_by(table.c.name)
        rows, total = self._database.page(query, limit, offset)
        return [
            TenantSummary(Tenant(row.tenant_id, row.name), row.created_at, row.suspended_at, row.num_keys)
            for row in rows
        ], total

    def is_suspended(self, tenant: Tenant) -> bool:
        table = tables.tenants
        query = select(table.c.suspended_at).where(table.c.tenant_id == tenant.tenant_id)
        row = self._database.first(query)
        return row is not None and row.suspended_at is not None

    def set_suspended(self, tenant: Tenant, moment: datetime | None, entry: NewEntry | None = None) -> bool:
        """Suspended since that moment; None: not any more. Returns whether that is a change."""
        table = tables.tenants
        other = table.c.suspended_at.is_not(None) if moment is None else table.c.suspended_at.is_(None)
        with self._database.transaction() as connection:
            changed = connection.execute(
                update(table).where(table.c.tenant_id == tenant.tenant_id, other).values(suspended_at=moment)
            )
            if changed.rowcount:
                _tell(connection, entry)
        return changed.rowcount > 0

    # --- keys ---------------------------------------------------------------------------------------------------------

    def add_key(self, key: ApiKey, entry: NewEntry | None = None) -> None:
        with self._database.transaction() as connection:
            connection.execute(insert(tables.api_keys).values(_values(key)))
            _tell(connection, entry)

    def replace_key(self, key_id: str, ends_at: datetime, key: ApiKey, entry: NewEntry | None = None) -> None:
        """``key`` in the place of another, which expires at that moment unless it does so before."""
        table = tables.api_keys
        later = or_(table.c.expires_at.is_(None), table.c.expires_at > ends_at)
        with self._database.transaction() as connection:
            connection.execute(insert(table).values(_values(key)))
            connection.execute(update(table).where(table.c.key_hash == key_id, later).values(expires_at=ends_at))
            _tell(connection, entry)

    def key(self, key_id: str) -> ApiKey | None:
        row = self._database.first(_keys().where(tables.api_keys.c.key_hash == key_id))
        return None if row is None else _key(row)

    def numbered(self, number: int) -> ApiKey | None:
        """The key that the API calls by that number."""
        begins = f"{number:012x}"
        row = self._database.first(_keys().where(tables.api_keys.c.key_hash.startswith(begins, autoescape=True)))
        return None if row is None else _key(row)

    def keys(self, tenant: Tenant | None, limit: int, offset: int) -> tuple[list[ApiKey], int]:
        """One page of the tenant's keys or of everyone's, by tenant and age, and the number of all."""
        table = tables.api_keys
        query = _keys().order_by(tables.tenants.c.name, table.c.created_at, table.c.key_hash)
        if tenant is not None:
            query = query.where(table.c.tenant_id == tenant.tenant_id)
        rows, total = self._database.page(query, limit, offset)
        return [_key(row) for row in rows], total

    def revoke_key(self, key_id: str, moment: datetime, entry: NewEntry | None = None) -> bool:
        """Returns whether it had not been revoked before."""
        table = tables.api_keys
        with self._database.transaction() as connection:
            changed = connection.execute(
                update(table).where(table.c.key_hash == key_id, table.c.revoked_at.is_(None)).values(revoked_at=moment)
            )
            if changed.rowcount:
                _tell(connection, entry)
        return changed.rowcount > 0

    def note_use(self, last_used_at: Mapping[str, datetime]) -> None:
        """When each key, by its id, was used last."""
        table = tables.api_keys
        with self._database.transaction() as connection:
            for key_id, moment in last_used_at.items():
                connection.execute(update(table).where(table.c.key_hash == key_id).values(last_used_at=moment))

    def has_valid_keys(self) -> bool:
        return self._database.first(select(tables.api_keys.c.key_hash).where(_opens(now())).limit(1)) is not None


def _tell(connection: Connection, entry: NewEntry | None) -> None:
    if entry is not None:
        entry.write(connection)


def _values(key: ApiKey) -> dict[str, Any]:
    return {
        "key_hash": key.key_id,
        "tenant_id": key.tenant.tenant_id,
        "hint": key.hint,
        "created_at": key.created_at,
        "name": key.name,
        "scopes": " ".join(key.scopes),
        "expires_at": key.expires_at,
    }


def _opens(moment: datetime) -> ColumnElement[bool]:
    """Of ``api_keys``: neither revoked nor expired."""
    table = tables.api_keys
    return and_(table.c.revoked_at.is_(None), or_(table.c.expires_at.is_(None), table.c.expires_at > moment))


def _keys() -> Select[Any]:
    owner = tables.tenants.c
    return select(tables.api_keys, owner.name.label("tenant_name"), owner.suspended_at).join(tables.tenants)


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        key_id=row.key_hash,
        tenant=Tenant(row.tenant_id, row.tenant_name),
        hint=row.hint,
        created_at=row.created_at,
        name=row.name,
        scopes=tuple(cast("Scope", scope) for scope in row.scopes.split()),
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        suspended=row.suspended_at is not None,
    )
