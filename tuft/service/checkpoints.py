"""Saved adapters: their names, their owners, who else may read them, and what is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Literal

import structlog

from tuft.errors import InvalidInput, NotFound, Unauthorized
from tuft.records import Checkpoint, CheckpointPath, Run, Tenant, now
from tuft.service.audit import Audit
from tuft.service.projects import Projects
from tuft.service.tenants import Tenants
from tuft.service.validation import check_ttl
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.weights import delete_adapter, files_to_hand_out, read_adapter, sweep, write_adapter, write_external
from tuft.types import AdapterState, CheckpointKind

log = structlog.get_logger(__name__)

Purpose = Literal["training", "sampling", "download", "copy"]
_WARNED_AHEAD = timedelta(hours=24)
_NUM_WARNED_OF = 5


class Checkpoints:
    """Checkpoints of one name and several kinds are several things. Disk work runs in threads."""

    def __init__(
        self, catalog: CheckpointCatalog, root: Path, tenants: Tenants, projects: Projects, audit: Audit
    ) -> None:
        self._catalog = catalog
        self._root = root
        self._tenants = tenants
        self._projects = projects
        self._audit = audit

    def get(self, tenant: Tenant, tinker_path: str, access_token: str | None = None) -> Checkpoint:
        """The checkpoint at that path if it is the tenant's own, of a project they share, or published; or if it is
        so for the tenant whose API key ``access_token`` is.

        Raises InvalidInput for a path of another shape or a token that no one has, else NotFound.
        """
        path = CheckpointPath.parse(tinker_path)
        readers = [tenant] if access_token is None else [tenant, self._holder(access_token)]
        for reader in readers:
            checkpoint = self._catalog.within_reach(reader, self._projects.shared_with(reader), path)
            if checkpoint is not None:
                return checkpoint
        raise _unknown(tinker_path)

    def loadable(self, tenant: Tenant, tinker_path: str, access_token: str | None = None) -> Checkpoint:
        """The same, and of a kind that runs and samplers can begin with."""
        checkpoint = self.get(tenant, tinker_path, access_token)
        if checkpoint.path.kind == "external":
            allowed = "external weights are there to be downloaded; load a training or a sampler checkpoint"
            raise InvalidInput("path", tinker_path, allowed)
        return checkpoint

    def note_read(self, tenant: Tenant, checkpoint: Checkpoint, purpose: Purpose) -> None:
        """The tenant has found the checkpoint here, and its weights are read for them now."""
        self._note(tenant, "read", checkpoint, purpose=purpose)

    def owned(self, tenant: Tenant, tinker_path: str) -> Checkpoint:
        """The tenant's own: what only they may change. Raises InvalidInput or NotFound."""
        checkpoint = self._catalog.owned(tenant, CheckpointPath.parse(tinker_path))
        if checkpoint is None:
            raise _unknown(tinker_path)
        return checkpoint

    def at(self, path: CheckpointPath) -> Checkpoint | None:
        """What has that name, whosever it is: for a caller who is known to have a right to it."""
        return self._catalog.get(path)

    def list(
        self, tenant_id: str, run_id: str | None, kinds: Collection[CheckpointKind], limit: int, offset: int
    ) -> tuple[list[Checkpoint], int]:
        """One page of the tenant's of these kinds, of one run or of all, newest first, and the number of all."""
        return self._catalog.page(tenant_id, kinds, limit, offset, run_id)

    def newest(self, run_ids: Collection[str]) -> Mapping[tuple[str, CheckpointKind], Checkpoint]:
        """The newest of each kind of each of those runs."""
        return self._catalog.newest(run_ids)

    def set_public(self, tenant: Tenant, tinker_path: str, public: bool) -> None:
        """Let every tenant read it, or only those who may without."""
        checkpoint = self.owned(tenant, tinker_path)
        self._catalog.set_public(checkpoint.path, public)
        self._note(tenant, "publish" if public else "unpublish", checkpoint)

    def set_ttl(self, tenant: Tenant, tinker_path: str, ttl_seconds: int | None) -> None:
        """From now on; None keeps it for ever."""
        check_ttl(ttl_seconds)
        checkpoint = self.owned(tenant, tinker_path)
        self._catalog.set_expiry(checkpoint.path, _expiry(now(), ttl_seconds))
        self._note(tenant, "ttl_set", checkpoint, ttl_seconds=ttl_seconds)

    def expiry_warning(self, tenant: Tenant) -> str | None:
        """What the tenant should know of their checkpoints that will soon be gone."""
        soon, num_soon = self._catalog.expiring(tenant, now() + _WARNED_AHEAD, _NUM_WARNED_OF)
        if not soon:
            return None
        named = ", ".join(f"{checkpoint.path} at {checkpoint.expires_at:%Y-%m-%d %H:%M} UTC" for checkpoint in soon)
        more = f" and {num_soon - len(soon)} more" if num_soon > len(soon) else ""
        keep = "set_checkpoint_ttl_from_tinker_path(path, None) keeps one"
        return f"checkpoints that expire within 24 hours: {named}{more}; {keep}"

    def delete(self, tenant: Tenant, tinker_path: str) -> None:
        """Forget the name; its files go too, unless a copy or a sampler still reads them."""
        checkpoint = self.owned(tenant, tinker_path)
        self._catalog.delete(checkpoint.path)
        self.discard(checkpoint.directory)
        self._note(tenant, "delete", checkpoint)

    def discard(self, directory: str) -> None:
        """Delete the files of ``directory`` unless a row still names it."""
        if not self._catalog.is_named(directory):
            delete_adapter(self._root, directory)

    def require_free(self, path: CheckpointPath) -> None:
        """Raises InvalidInput if the name is taken."""
        if self.at(path) is not None:
            raise InvalidInput("path", path.name, f"{path} exists already; pass overwrite=True or another name")

    async def save(
        self,
        tenant: Tenant,
        run: Run,
        path: CheckpointPath,
        state: AdapterState,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, str],
        recipients: Sequence[str] | None = None,
    ) -> Checkpoint:
        """Write ``state`` of ``run`` and give it that name; what had the name before is replaced at that moment.

        An external checkpoint is encrypted to ``recipients``, if there are any.
        """
        if path.kind == "external":
            directory = _new_directory(run, path.name)
            size_bytes = await asyncio.to_thread(
                write_external, self._root, directory, state, run.base_model, recipients
            )
        else:
            directory, size_bytes = await self.write(run, path.name, state)
        moment = now()
        checkpoint = Checkpoint(
            path=path,
            tenant_id=run.tenant_id,
            base_model=run.base_model,
            spec=run.spec,
            directory=directory,
            size_bytes=size_bytes,
            has_optimizer=bool(state.exp_avg),
            created_at=moment,
            expires_at=_expiry(moment, ttl_seconds),
            user_metadata=dict(user_metadata),
            optimizer=run.optimizer,
        )
        replaced = self._catalog.put(checkpoint)
        if replaced is not None:
            self.discard(replaced)
        self._note(tenant, "save", checkpoint)
        return checkpoint

    def add_copy(self, tenant: Tenant, source: Checkpoint, path: CheckpointPath, ttl_seconds: int | None) -> None:
        """A further name for the files of ``source``, which never change."""
        moment = now()
        copy = replace(
            source,
            path=path,
            tenant_id=tenant.tenant_id,
            created_at=moment,
            expires_at=_expiry(moment, ttl_seconds),
            public=False,
        )
        self._catalog.put(copy)
        self._note(tenant, "save", copy, copied_from=str(source.path))

    async def write(self, run: Run, name: str, state: AdapterState) -> tuple[str, int]:
        """Write ``state`` under a directory that no row names yet. Returns the directory and its bytes."""
        directory = _new_directory(run, name)
        return directory, await asyncio.to_thread(write_adapter, self._root, directory, state, run.base_model)

    async def read(self, directory: str, *, with_optimizer: bool) -> AdapterState:
        return await asyncio.to_thread(read_adapter, self._root, directory, with_optimizer=with_optimizer)

    async def files(self, checkpoint: Checkpoint) -> Mapping[str, Path]:
        """What may be downloaded of it, by name."""
        return await asyncio.to_thread(files_to_hand_out, self._root, checkpoint.directory)

    def expire(self) -> None:
        """Delete what has outlived its ttl."""
        for checkpoint in self._catalog.delete_expired():
            self.discard(checkpoint.directory)
            log.info("a checkpoint has expired", path=str(checkpoint.path), tenant_id=checkpoint.tenant_id)

    async def sweep(self) -> int:
        """Delete what an earlier server left half-written. Only while nothing is being saved."""
        return await asyncio.to_thread(sweep, self._root)

    def _holder(self, access_token: str) -> Tenant:
        try:
            return self._tenants.authenticate(access_token)
        except Unauthorized as error:  # 401 would mean the caller's own key
            allowed = "must be an API key of a tenant who may read the checkpoint"
            raise InvalidInput("weights_access_token", f"…{access_token[-4:]}", allowed) from error

    def _note(self, tenant: Tenant, event: str, checkpoint: Checkpoint, **details: str | int | None) -> None:
        """Every event of a checkpoint passes here."""
        path = checkpoint.path
        self._audit.note(
            tenant,
            f"checkpoint_{event}",
            checkpoint.tenant_id,
            model_id=path.run_id,
            tinker_path=str(path),
            **details,
        )


def _unknown(tinker_path: str) -> NotFound:
    return NotFound(f"path: no checkpoint {tinker_path!r}; list_user_checkpoints() shows yours")


def _expiry(moment: datetime, ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else moment + timedelta(seconds=ttl_seconds)


def _new_directory(run: Run, name: str) -> str:
    return f"{run.tenant_id}/{run.run_id}/{name}-{token_hex(6)}"
