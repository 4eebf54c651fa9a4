"""Whose a thing is: the one place where rows are compared with the tenant who asks, and where an owner is found.

A query for a tenant's thing has ``own`` or ``within_reach`` among its conditions, so that another's is not found: it is
read like one that does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, and_, or_, select

from tuft.errors import InvalidInput
from tuft.records import CheckpointPath, Shared, Tenant
from tuft.store import tables
from tuft.store.db import Database


def own(table: Table, tenant: Tenant) -> ColumnElement[bool]:
    """Of a table whose rows have owners: the tenant's."""
    mine: ColumnElement[bool] = table.c.tenant_id == tenant.tenant_id
    return mine


def within_reach(tenant: Tenant, shared: Shared) -> ColumnElement[bool]:
    """Of ``sessions``: the tenant's own, and in a shared project those of its other members too."""
    table = tables.sessions
    reachable = [own(table, tenant)]
    for project_id, members in shared.items():
        owners = select(tables.tenants.c.tenant_id).where(tables.tenants.c.name.in_(members))
        reachable.append(and_(table.c.project_id == project_id, table.c.tenant_id.in_(owners)))
    return or_(*reachable)


class Owners:
    """Finds whose an id is. Never for an answer to a client: that would tell apart what must look alike."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def owner(self, kind: str, named: str) -> str | None:
        """The id of the tenant who has the thing of that kind and id; None if nobody has. Raises StorageError."""
        query = _QUERIES[kind](named)
        row = None if query is None else self._database.first(query)
        return None if row is None else str(row.tenant_id)

    def name(self, tenant_id: str) -> str:
        """The name of the tenant of that id."""
        table = tables.tenants
        row = self._database.first(select(table.c.name).where(table.c.tenant_id == tenant_id))
        return "" if row is None else str(row.name)


def _by(table: Table, column: str) -> Callable[[str], Select[Any] | None]:
    return lambda named: select(table.c.tenant_id).where(table.c[column] == named)


def _checkpoint(named: str) -> Select[Any] | None:
    try:
        path = CheckpointPath.parse(named)
    except InvalidInput:
        return None
    table = tables.checkpoints
    named_so = (table.c.run_id == path.run_id, table.c.kind == path.kind, table.c.name == path.name)
    return select(table.c.tenant_id).where(*named_so)


def _sequence(named: str) -> Select[Any] | None:
    """Sampled sequences are numbered within their sampler: ``<sampler>:<seq>:<index>``."""
    return _QUERIES["sampler"](named.rsplit(":", 2)[0])


_QUERIES: Mapping[str, Callable[[str], Select[Any] | None]] = {
    "session": _by(tables.sessions, "session_id"),
    "run": _by(tables.runs, "run_id"),
    "sampler": _by(tables.samplers, "sampler_id"),
    "future": _by(tables.futures, "future_id"),
    "checkpoint": _checkpoint,
    "link": _checkpoint,
    "trace": _by(tables.sessions, "session_id"),
    "custom_loss": _by(tables.custom_losses, "loss_id"),
    "sequence": _sequence,
}
KINDS = frozenset(_QUERIES)
