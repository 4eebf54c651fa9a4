"""The rows of checkpoints: what a name means, whose it is, who may read it, until when, and whether it is whole."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, exists, func, insert, select, update

from tuft.records import Checkpoint, CheckpointPath, Shared, Tenant, now
from tuft.store import tables
from tuft.store.catalog import lora_spec, lora_values
from tuft.store.db import Database
from tuft.store.ownership import own, within_reach
from tuft.types import CheckpointKind


class CheckpointCatalog:
    """Rows in, records out; what has expired is not there, and what is damaged is in no list, only under its name.
    Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, checkpoint: Checkpoint) -> str | None:
        """Insert, or give the name its new meaning, in one transaction. Returns the directory it had before."""
        before = select(tables.checkpoints.c.directory).where(*_named(checkpoint.path))
        with self._database.transaction() as connection:
            directory = connection.execute(before).scalar()
            connection.execute(delete(tables.checkpoints).where(*_named(checkpoint.path)))
            connection.execute(
                insert(tables.checkpoints).values(
                    run_id=checkpoint.path.run_id,
                    kind=checkpoint.path.kind,
                    name=checkpoint.path.name,
                    tenant_id=checkpoint.tenant_id,
                    base_model=checkpoint.base_model,
                    **lora_values(checkpoint.spec),
                    optimizer=checkpoint.optimizer,
                    public=checkpoint.public,
                    directory=checkpoint.directory,
                    size_bytes=checkpoint.size_bytes,
                    has_optimizer=checkpoint.has_optimizer,
                    created_at=checkpoint.created_at,
                    expires_at=checkpoint.expires_at,
                    user_metadata=dict(checkpoint.user_metadata),
                    digest=checkpoint.digest,
                    saved_seq=checkpoint.saved_seq,
                    verified_at=checkpoint.created_at,
                )
            )
        return directory

    def get(self, path: CheckpointPath) -> Checkpoint | None:
        """Whoever owns it: for a caller whose right to it is known already."""
        return self._first(*_named(path))

    def owned(self, tenant: Tenant, path: CheckpointPath) -> Checkpoint | None:
        return self._first(*_named(path), own(tables.checkpoints, tenant))

    def within_reach(self, tenant: Tenant, shared: Shared, path: CheckpointPath) -> Checkpoint | None:
        """The tenant's own, one of a shared project, or a published one."""
        of_run = select(1).select_from(tables.runs).join(tables.sessions).where(within_reach(tenant, shared))
        reachable = exists(of_run.where(tables.runs.c.run_id == tables.checkpoints.c.run_id))
        return self._first(*_named(path), tables.checkpoints.c.public | reachable)

    def page(
        self, tenant_id: str, kinds: Collection[CheckpointKind], limit: int, offset: int, run_id: str | None = None
    ) -> tuple[list[Checkpoint], int]:
        """One page of the tenant's of these kinds, newest first, and the number of all."""
        table = tables.checkpoints
        query = select(table).where(table.c.tenant_id == tenant_id, table.c.kind.in_(kinds), *_listed())
        if run_id is not None:
            query = query.where(table.c.run_id == run_id)
        newest_first = (table.c.created_at.desc(), table.c.run_id, table.c.kind, table.c.name)
        rows, total = self._database.page(query.order_by(*newest_first), limit, offset)
        return [_checkpoint(row) for row in rows], total

    def newest(self, run_ids: Collection[str]) -> dict[tuple[str, CheckpointKind], Checkpoint]:
        """The newest checkpoint of each kind of each of those runs."""
        table = tables.checkpoints
        age = func.row_number().over(partition_by=(table.c.run_id, table.c.kind), order_by=table.c.created_at.desc())
        ranked = select(table, age.label("age")).where(table.c.run_id.in_(run_ids), *_listed()).subquery()
        found = map(_checkpoint, self._database.all(select(ranked).where(ranked.c.age == 1)))
        return {(checkpoint.path.run_id, checkpoint.path.kind): checkpoint for checkpoint in found}

    def expiring(self, tenant: Tenant, before: datetime, limit: int) -> tuple[list[Checkpoint], int]:
        """The tenant's first to expire before that moment, and the number of all that will."""
        table = tables.checkpoints
        query = select(table).where(own(table, tenant), table.c.expires_at < before, *_listed())
        rows, total = self._database.page(query.order_by(table.c.expires_at), limit, 0)
        return [_checkpoint(row) for row in rows], total

    def set_public(self, path: CheckpointPath, public: bool) -> None:
        with self._database.transaction() as connection:
            connection.execute(update(tables.checkpoints).where(*_named(path)).values(public=public))

    def set_expiry(self, path: CheckpointPath, expires_at: datetime | None) -> None:
        with self._database.transaction() as connection:
            connection.execute(update(tables.checkpoints).where(*_named(path)).values(expires_at=expires_at))

    def delete(self, path: CheckpointPath) -> None:
        with self._database.transaction() as connection:
            connection.execute(delete(tables.checkpoints).where(*_named(path)))

    def delete_expired(self) -> list[Checkpoint]:
        """Returns what was deleted."""
        table = tables.checkpoints
        expired = table.c.expires_at <= now()
        with self._database.transaction() as connection:
            rows = list(connection.execute(select(table).where(expired)))
            if rows:
                connection.execute(delete(table).where(expired))
        return [_checkpoint(row) for row in rows]

    def is_named(self, directory: str) -> bool:
        """Whether a checkpoint or a sampler still reads that weights directory."""
        return any(
            self._database.first(select(table.c.directory).where(table.c.directory == directory).limit(1)) is not None
            for table in (tables.checkpoints, tables.samplers)
        )

    def all(self, tenant_id: str | None = None) -> list[Checkpoint]:
        """Of one tenant or of all, damaged or not, by their names: for the operator."""
        table = tables.checkpoints
        query = select(table).where(_unexpired()).order_by(table.c.run_id, table.c.kind, table.c.name)
        return list(
            map(
                _checkpoint,
                self._database.all(query if tenant_id is None else query.where(table.c.tenant_id == tenant_id)),
            )
        )

    def digest(self, directory: str) -> str | None:
        """The digest of the checkpoint that is in that directory, if a row has one."""
        column = tables.checkpoints.c.digest
        query = select(column).where(tables.checkpoints.c.directory == directory, column.is_not(None)).limit(1)
        row = self._database.first(query)
        return None if row is None else row.digest

    def to_verify(self, whole_before: datetime, damaged_before: datetime) -> Checkpoint | None:
        """The one whose files were not read for longest: before the first moment if they were whole then, before the
        second if they were not."""
        table = tables.checkpoints
        seen = table.c.verified_at
        due = seen.is_(None) | (seen < whole_before) | (table.c.damage.is_not(None) & (seen < damaged_before))
        row = self._database.first(
            select(table).where(due, _unexpired()).order_by(seen.is_not(None), seen, table.c.directory).limit(1)
        )
        return None if row is None else _checkpoint(row)

    def note_verified(self, directory: str, damage: str | None) -> bool:
        """What all names of these files are to say of them; False if they have no name any more."""
        table = tables.checkpoints
        with self._database.transaction() as connection:
            changed = connection.execute(
                update(table).where(table.c.directory == directory).values(damage=damage, verified_at=now())
            )
        return changed.rowcount > 0

    def named_directories(self) -> set[str]:
        """All that checkpoints and samplers read from."""
        return {
            row.directory
            for table in (tables.checkpoints, tables.samplers)
            for row in self._database.all(select(table.c.directory).where(table.c.directory.is_not(None)).distinct())
        }

    def _first(self, *conditions: Any) -> Checkpoint | None:
        row = self._database.first(select(tables.checkpoints).where(*conditions, _unexpired()))
        return None if row is None else _checkpoint(row)


def _named(path: CheckpointPath) -> tuple[Any, ...]:
    table = tables.checkpoints
    return table.c.run_id == path.run_id, table.c.kind == path.kind, table.c.name == path.name


def _listed() -> tuple[Any, ...]:
    return _unexpired(), tables.checkpoints.c.damage.is_(None)


def _unexpired() -> Any:
    column = tables.checkpoints.c.expires_at
    return column.is_(None) | (column > now())


def _checkpoint(row: Row[Any]) -> Checkpoint:
    return Checkpoint(
        path=CheckpointPath(row.run_id, row.kind, row.name),
        tenant_id=row.tenant_id,
        base_model=row.base_model,
        spec=lora_spec(row),
        directory=row.directory,
        size_bytes=row.size_bytes,
        has_optimizer=row.has_optimizer,
        created_at=row.created_at,
        expires_at=row.expires_at,
        user_metadata=row.user_metadata,
        optimizer=row.optimizer,
        public=row.public,
        digest=row.digest,
        saved_seq=row.saved_seq,
        damage=row.damage,
    )
