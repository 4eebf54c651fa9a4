"""Reading and writing the rows. Every read of a tenant's object takes the tenant, so that another's is not found."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from tuft.records import Checkpoint, CheckpointPath, Run, RunStatus, SamplerInfo, Session, Tenant, now
from tuft.store import tables
from tuft.store.db import Database
from tuft.types import LoraSpec


class Catalog:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- tenants and keys ---------------------------------------------------------------------------------------------

    def ensure_tenant(self, tenant: Tenant) -> Tenant:
        """The tenant of that name, made from ``tenant`` if there is none."""
        query = select(tables.tenants).where(tables.tenants.c.name == tenant.name)
        row = self._database.first(query)
        if row is None:
            try:
                self._database.insert(tables.tenants, tenant_id=tenant.tenant_id, name=tenant.name, created_at=now())
            except IntegrityError:  # another process was faster: `tuft key create` beside the server
                row = self._database.first(query)
        return tenant if row is None else Tenant(row.tenant_id, row.name)

    def add_key(self, tenant: Tenant, key_hash: str, hint: str) -> None:
        self._database.insert(
            tables.api_keys, key_hash=key_hash, tenant_id=tenant.tenant_id, hint=hint, created_at=now()
        )

    def tenant_of_key(self, key_hash: str) -> Tenant | None:
        row = self._database.first(
            select(tables.tenants).join(tables.api_keys).where(tables.api_keys.c.key_hash == key_hash)
        )
        return None if row is None else Tenant(row.tenant_id, row.name)

    def has_keys(self) -> bool:
        return self._database.first(select(tables.api_keys.c.key_hash).limit(1)) is not None

    # --- sessions -----------------------------------------------------------------------------------------------------

    def add_session(self, session: Session) -> None:
        self._database.insert(
            tables.sessions,
            session_id=session.session_id,
            tenant_id=session.tenant_id,
            created_at=session.created_at,
            tags=list(session.tags),
            user_metadata=dict(session.user_metadata),
            sdk_version=session.sdk_version,
            display_name=session.display_name,
        )

    def session(self, tenant: Tenant, session_id: str) -> Session | None:
        table = tables.sessions
        row = self._database.first(
            select(table).where(table.c.session_id == session_id, table.c.tenant_id == tenant.tenant_id)
        )
        return None if row is None else _session(row)

    def sessions(self, tenant: Tenant, limit: int, offset: int) -> tuple[list[Session], int]:
        table = tables.sessions
        query = select(table).where(table.c.tenant_id == tenant.tenant_id).order_by(table.c.created_at.desc())
        rows, total = self._database.page(query, limit, offset)
        return [_session(row) for row in rows], total

    def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """The first reason wins."""
        table = tables.sessions
        with self._database.transaction() as connection:
            connection.execute(
                update(table)
                .where(table.c.session_id == session_id, table.c.finish_reason.is_(None))
                .values(finish_reason=reason, finish_detail=detail)
            )

    # --- runs ---------------------------------------------------------------------------------------------------------

    def add_run(self, run: Run) -> None:
        self._database.insert(
            tables.runs,
            run_id=run.run_id,
            tenant_id=run.tenant_id,
            session_id=run.session_id,
            model_seq_id=run.model_seq_id,
            base_model=run.base_model,
            **_lora_values(run.spec),
            status=run.status,
            created_at=run.created_at,
            last_request_at=run.last_request_at,
            user_metadata=dict(run.user_metadata),
        )

    def run(self, tenant: Tenant, run_id: str) -> Run | None:
        table = tables.runs
        row = self._database.first(select(table).where(table.c.run_id == run_id, table.c.tenant_id == tenant.tenant_id))
        return None if row is None else _run(row)

    def runs(self, tenant: Tenant, limit: int, offset: int, session_id: str | None = None) -> tuple[list[Run], int]:
        table = tables.runs
        query = select(table).where(table.c.tenant_id == tenant.tenant_id).order_by(table.c.created_at.desc())
        if session_id is not None:
            query = query.where(table.c.session_id == session_id)
        rows, total = self._database.page(query, limit, offset)
        return [_run(row) for row in rows], total

    def set_run_status(self, run_id: str, status: RunStatus) -> None:
        table = tables.runs
        with self._database.transaction() as connection:
            connection.execute(update(table).where(table.c.run_id == run_id).values(status=status))

    def touch_runs(self, last_request_at: dict[str, datetime]) -> None:
        table = tables.runs
        with self._database.transaction() as connection:
            for run_id, moment in last_request_at.items():
                connection.execute(update(table).where(table.c.run_id == run_id).values(last_request_at=moment))

    def lose_live_runs(self) -> int:
        """Called at start: what an earlier server held live is gone. Returns how many runs that were."""
        table = tables.runs
        with self._database.transaction() as connection:
            changed = connection.execute(
                update(table).where(table.c.status.in_(("creating", "live"))).values(status="lost")
            )
        return changed.rowcount

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def put_checkpoint(self, checkpoint: Checkpoint) -> str | None:
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
                    **_lora_values(checkpoint.spec),
                    directory=checkpoint.directory,
                    size_bytes=checkpoint.size_bytes,
                    has_optimizer=checkpoint.has_optimizer,
                    created_at=checkpoint.created_at,
                    expires_at=checkpoint.expires_at,
                    user_metadata=dict(checkpoint.user_metadata),
                )
            )
        return directory

    def checkpoint(self, tenant: Tenant, path: CheckpointPath) -> Checkpoint | None:
        table = tables.checkpoints
        row = self._database.first(
            select(table).where(*_named(path), table.c.tenant_id == tenant.tenant_id, _unexpired())
        )
        return None if row is None else _checkpoint(row)

    def checkpoints(
        self, tenant: Tenant, limit: int, offset: int, run_id: str | None = None, kind: str | None = None
    ) -> tuple[list[Checkpoint], int]:
        table = tables.checkpoints
        query = select(table).where(table.c.tenant_id == tenant.tenant_id, _unexpired())
        if run_id is not None:
            query = query.where(table.c.run_id == run_id)
        if kind is not None:
            query = query.where(table.c.kind == kind)
        rows, total = self._database.page(query.order_by(table.c.created_at.desc()), limit, offset)
        return [_checkpoint(row) for row in rows], total

    def delete_checkpoint(self, path: CheckpointPath) -> None:
        with self._database.transaction() as connection:
            connection.execute(delete(tables.checkpoints).where(*_named(path)))

    def delete_expired_checkpoints(self) -> list[str]:
        """Returns the directories of those that were deleted."""
        table = tables.checkpoints
        expired = table.c.expires_at <= now()
        with self._database.transaction() as connection:
            directories = list(connection.execute(select(table.c.directory).where(expired)).scalars())
            connection.execute(delete(table).where(expired))
        return directories

    def live_directories(self) -> set[str]:
        """Every weights directory that a row still points to."""
        with self._database.transaction() as connection:
            found = set(connection.execute(select(tables.checkpoints.c.directory)).scalars())
            ephemeral = select(tables.samplers.c.directory).where(tables.samplers.c.directory.is_not(None))
            return found | {directory for directory in connection.execute(ephemeral).scalars() if directory}

    # --- samplers -----------------------------------------------------------------------------------------------------

    def add_sampler(self, sampler: SamplerInfo) -> None:
        self._database.insert(
            tables.samplers,
            sampler_id=sampler.sampler_id,
            tenant_id=sampler.tenant_id,
            session_id=sampler.session_id,
            sampling_session_seq_id=sampler.sampling_session_seq_id,
            base_model=sampler.base_model,
            model_path=sampler.model_path,
            directory=sampler.directory,
            created_at=sampler.created_at,
        )

    def sampler(self, tenant: Tenant, sampler_id: str) -> SamplerInfo | None:
        table = tables.samplers
        row = self._database.first(
            select(table).where(table.c.sampler_id == sampler_id, table.c.tenant_id == tenant.tenant_id)
        )
        return None if row is None else _sampler(row)

    def has_sampler(self, sampler_id: str) -> bool:
        table = tables.samplers
        return self._database.first(select(table.c.sampler_id).where(table.c.sampler_id == sampler_id)) is not None

    def samplers(self, tenant: Tenant, session_id: str) -> list[SamplerInfo]:
        table = tables.samplers
        query = select(table).where(table.c.session_id == session_id, table.c.tenant_id == tenant.tenant_id)
        with self._database.transaction() as connection:
            return [_sampler(row) for row in connection.execute(query.order_by(table.c.created_at))]

    def ephemeral_sessions(self) -> set[str]:
        """Sessions that have samplers on weights of their own."""
        with self._database.transaction() as connection:
            return set(connection.execute(select(tables.samplers.c.session_id).where(*_ephemeral())).scalars())

    def delete_ephemeral_samplers(self, session_id: str) -> list[str]:
        """Forget them; returns the directories of their weights."""
        table = tables.samplers
        with self._database.transaction() as connection:
            of_session = (table.c.session_id == session_id, *_ephemeral())
            directories = list(connection.execute(select(table.c.directory).where(*of_session)).scalars())
            connection.execute(delete(table).where(*of_session))
        return [directory for directory in directories if directory is not None]


def _ephemeral() -> tuple[Any, ...]:
    return tables.samplers.c.directory.is_not(None), tables.samplers.c.model_path.is_(None)


def _lora_values(spec: LoraSpec) -> dict[str, Any]:
    return {
        "rank": spec.rank,
        "seed": spec.seed,
        "train_attn": spec.train_attn,
        "train_mlp": spec.train_mlp,
        "train_unembed": spec.train_unembed,
    }


def _spec(row: Row[Any]) -> LoraSpec:
    return LoraSpec(row.rank, row.seed, row.train_attn, row.train_mlp, row.train_unembed)


def _named(path: CheckpointPath) -> tuple[Any, ...]:
    table = tables.checkpoints
    return table.c.run_id == path.run_id, table.c.kind == path.kind, table.c.name == path.name


def _unexpired() -> Any:
    column = tables.checkpoints.c.expires_at
    return column.is_(None) | (column > now())


def _session(row: Row[Any]) -> Session:
    return Session(
        session_id=row.session_id,
        tenant_id=row.tenant_id,
        created_at=row.created_at,
        tags=tuple(row.tags),
        user_metadata=row.user_metadata,
        sdk_version=row.sdk_version,
        display_name=row.display_name,
        finished=row.finish_reason is not None,
    )


def _run(row: Row[Any]) -> Run:
    return Run(
        run_id=row.run_id,
        tenant_id=row.tenant_id,
        session_id=row.session_id,
        model_seq_id=row.model_seq_id,
        base_model=row.base_model,
        spec=_spec(row),
        status=row.status,
        created_at=row.created_at,
        last_request_at=row.last_request_at,
        user_metadata=row.user_metadata,
    )


def _checkpoint(row: Row[Any]) -> Checkpoint:
    return Checkpoint(
        path=CheckpointPath(row.run_id, row.kind, row.name),
        tenant_id=row.tenant_id,
        base_model=row.base_model,
        spec=_spec(row),
        directory=row.directory,
        size_bytes=row.size_bytes,
        has_optimizer=row.has_optimizer,
        created_at=row.created_at,
        expires_at=row.expires_at,
        user_metadata=row.user_metadata,
    )


def _sampler(row: Row[Any]) -> SamplerInfo:
    return SamplerInfo(
        sampler_id=row.sampler_id,
        tenant_id=row.tenant_id,
        session_id=row.session_id,
        sampling_session_seq_id=row.sampling_session_seq_id,
        base_model=row.base_model,
        model_path=row.model_path,
        directory=row.directory,
        created_at=row.created_at,
    )
