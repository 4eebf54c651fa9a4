"""Reading and writing the rows. Every read of a tenant's object takes the tenant, so that another's is not found."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, func, select, update

from tuft.config import DEFAULT_PROJECT
from tuft.records import Run, RunStatus, SamplerInfo, Shared, Tenant
from tuft.store import tables
from tuft.store.db import Database
from tuft.store.ownership import own, within_reach
from tuft.types import LoraSpec


class Catalog:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- runs ---------------------------------------------------------------------------------------------------------

    def add_run(self, run: Run) -> None:
        self._database.insert(
            tables.runs,
            run_id=run.run_id,
            tenant_id=run.tenant_id,
            session_id=run.session_id,
            model_seq_id=run.model_seq_id,
            base_model=run.base_model,
            **lora_values(run.spec),
            optimizer=run.optimizer,
            status=run.status,
            created_at=run.created_at,
            last_request_at=run.last_request_at,
            user_metadata=dict(run.user_metadata),
            key_number=run.key_number,
        )

    def run(self, tenant: Tenant, run_id: str) -> Run | None:
        table = tables.runs
        row = self._database.first(select(table).where(table.c.run_id == run_id, own(table, tenant)))
        return None if row is None else _run(row)

    def run_within_reach(self, tenant: Tenant, shared: Shared, run_id: str) -> Run | None:
        """The tenant's own, or one of a shared project."""
        query = select(tables.runs).join(tables.sessions).where(within_reach(tenant, shared))
        row = self._database.first(query.where(tables.runs.c.run_id == run_id))
        return None if row is None else _run(row)

    def runs(
        self, tenant: Tenant, limit: int, offset: int, shared: Shared, project_id: str | None = None
    ) -> tuple[list[Run], int]:
        """One page of the tenant's and of those in shared projects, newest first, and the number of all."""
        table, sessions = tables.runs, tables.sessions
        query = select(table).join(sessions).where(within_reach(tenant, shared))
        if project_id is not None:
            query = query.where(func.coalesce(sessions.c.project_id, DEFAULT_PROJECT) == project_id)
        rows, total = self._database.page(query.order_by(table.c.created_at.desc(), table.c.run_id), limit, offset)
        return [_run(row) for row in rows], total

    def tenant_names(self, tenant_ids: Collection[str]) -> dict[str, str]:
        table = tables.tenants
        rows = self._database.all(select(table.c.tenant_id, table.c.name).where(table.c.tenant_id.in_(tenant_ids)))
        return {row.tenant_id: row.name for row in rows}

    def set_run_status(self, run_id: str, status: RunStatus) -> None:
        table = tables.runs
        with self._database.transaction() as connection:
            connection.execute(update(table).where(table.c.run_id == run_id).values(status=status))

    def touch_runs(self, last_request_at: dict[str, datetime]) -> None:
        table = tables.runs
        with self._database.transaction() as connection:
            for run_id, moment in last_request_at.items():
                connection.execute(update(table).where(table.c.run_id == run_id).values(last_request_at=moment))

    def open_runs(self) -> list[Run]:
        """Those that take operations, of all tenants, oldest first."""
        table = tables.runs
        query = select(table).where(table.c.status.in_(("creating", "live"))).order_by(table.c.created_at)
        return [_run(row) for row in self._database.all(query)]

    def delete_run(self, run_id: str) -> None:
        """One that never began."""
        with self._database.transaction() as connection:
            connection.execute(delete(tables.runs).where(tables.runs.c.run_id == run_id))

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
            inflight_run_id=sampler.inflight_run_id,
            saved_seq=sampler.saved_seq,
            created_at=sampler.created_at,
        )

    def move_inflight_samplers(self, run_id: str, directory: str) -> list[str]:
        """All samplers on the run's mutable weights have those of ``directory`` now. Returns what they had before."""
        table = tables.samplers
        moved = (table.c.inflight_run_id == run_id, table.c.directory != directory)
        with self._database.transaction() as connection:
            before = list(connection.execute(select(table.c.directory).where(*moved).distinct()).scalars())
            connection.execute(update(table).where(*moved).values(directory=directory))
        return before

    def count_join(self, tenant: Tenant, sampler_id: str) -> int | None:
        """One more client has joined the sampling session: returns how many have. None if there is no such session."""
        table = tables.samplers
        counted = update(table).where(table.c.sampler_id == sampler_id, own(table, tenant))
        with self._database.transaction() as connection:
            return connection.execute(
                counted.values(num_joined=table.c.num_joined + 1).returning(table.c.num_joined)
            ).scalar()

    def sampler(self, tenant: Tenant, sampler_id: str) -> SamplerInfo | None:
        table = tables.samplers
        row = self._database.first(select(table).where(table.c.sampler_id == sampler_id, own(table, tenant)))
        return None if row is None else _sampler(row)

    def has_sampler(self, sampler_id: str) -> bool:
        table = tables.samplers
        return self._database.first(select(table.c.sampler_id).where(table.c.sampler_id == sampler_id)) is not None

    def samplers(self, tenant: Tenant, session_id: str) -> list[SamplerInfo]:
        table = tables.samplers
        query = select(table).where(table.c.session_id == session_id, own(table, tenant))
        with self._database.transaction() as connection:
            return [_sampler(row) for row in connection.execute(query.order_by(table.c.created_at))]

    def ephemeral_sessions(self) -> set[str]:
        """Sessions that have samplers on weights which no checkpoint names, or names any more."""
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
    column = tables.samplers.c.directory
    return column.is_not(None), column.not_in(select(tables.checkpoints.c.directory))


def lora_values(spec: LoraSpec) -> dict[str, Any]:
    return {
        "rank": spec.rank,
        "seed": spec.seed,
        "train_attn": spec.train_attn,
        "train_mlp": spec.train_mlp,
        "train_unembed": spec.train_unembed,
    }


def lora_spec(row: Row[Any]) -> LoraSpec:
    return LoraSpec(row.rank, row.seed, row.train_attn, row.train_mlp, row.train_unembed)


def _run(row: Row[Any]) -> Run:
    return Run(
        run_id=row.run_id,
        tenant_id=row.tenant_id,
        session_id=row.session_id,
        model_seq_id=row.model_seq_id,
        base_model=row.base_model,
        spec=lora_spec(row),
        status=row.status,
        created_at=row.created_at,
        last_request_at=row.last_request_at,
        user_metadata=row.user_metadata,
        optimizer=row.optimizer,
        key_number=row.key_number,
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
        inflight_run_id=row.inflight_run_id,
        saved_seq=row.saved_seq,
    )
