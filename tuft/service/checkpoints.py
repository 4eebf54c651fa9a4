"""Saved adapters: their names, their owners, who else may read them, and what is on disk."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Literal

import structlog

from tuft.errors import Damaged, Forbidden, InvalidInput, NotFound, StorageError, Unauthorized, refusing
from tuft.records import Checkpoint, CheckpointPath, Run, Tenant, now
from tuft.sections import StorageSection
from tuft.service.audit import Audit
from tuft.service.projects import Projects
from tuft.service.tenants import Tenants
from tuft.service.validation import check_ttl
from tuft.service.verification import ADVICE, Verification
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.weights import (
    Written,
    delete_adapter,
    files_to_hand_out,
    read_adapter,
    sweep,
    write_adapter,
    write_external,
)
from tuft.types import AdapterState, CheckpointKind, Optimizer

log = structlog.get_logger(__name__)

Purpose = Literal["training", "sampling", "download", "copy"]
_WARNED_AHEAD = timedelta(hours=24)
_NUM_WARNED_OF = 5


class Checkpoints:
    """Checkpoints of one name and several kinds are several things. Disk work runs in threads."""

    def __init__(
        self,
        catalog: CheckpointCatalog,
        root: Path,
        storage: StorageSection,
        tenants: Tenants,
        projects: Projects,
        audit: Audit,
    ) -> None:
        self._catalog = catalog
        self._root = root
        self._min_free_bytes = storage.min_free_bytes
        self._held: Counter[str] = Counter()  # directories that are being read
        self._unnamed: set[str] = set()  # those of them that go when nobody reads them any more
        self.verification = Verification(catalog, root, storage)
        self._tenants = tenants
        self._projects = projects
        self._audit = audit

    def get(self, tenant: Tenant, tinker_path: str, access_token: str | None = None) -> Checkpoint:
        """The checkpoint at that path if it is the tenant's own, of a project they share, or published; or if it is
        so for the tenant whose API key ``access_token`` is.

        Raises InvalidInput for a path of another shape or a token that no one has, NotFound, or Damaged.
        """
        return self._found(self.readers(tenant, access_token), tinker_path)

    def readers(self, tenant: Tenant, access_token: str | None) -> tuple[Tenant, ...]:
        """Who may read what ``tenant`` asks for: they, and the tenant whose API key ``access_token`` is. Raises
        InvalidInput for a token that no one has."""
        return (tenant,) if access_token is None else (tenant, self._holder(access_token))

    def loadable(self, readers: Sequence[Tenant], tinker_path: str) -> Checkpoint:
        """The checkpoint at that path if one of ``readers`` may read it, and of a kind that runs and samplers can begin
        with."""
        checkpoint = self._found(readers, tinker_path)
        if checkpoint.path.kind == "external":
            allowed = "external weights are there to be downloaded; load a training or a sampler checkpoint"
            raise InvalidInput("path", tinker_path, allowed)
        return checkpoint

    def is_saved_by(self, path: CheckpointPath, seq: int) -> bool:
        """True if operation ``seq`` of the run has saved it already: an earlier server died before it could say so."""
        checkpoint = self.at(path)
        return checkpoint is not None and checkpoint.saved_seq == seq

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

    async def list(
        self, tenant_id: str, run_id: str | None, kinds: Collection[CheckpointKind], limit: int, offset: int
    ) -> tuple[list[Checkpoint], int]:
        """One page of the tenant's of these kinds, of one run or of all, newest first, and the number of all. All files
        of those on the page are there."""
        while True:
            checkpoints, total = self._catalog.page(tenant_id, kinds, limit, offset, run_id)
            if await self.verification.all_present(checkpoints):
                return checkpoints, total

    async def newest(self, run_ids: Collection[str]) -> Mapping[tuple[str, CheckpointKind], Checkpoint]:
        """The newest of each kind of each of those runs whose files are all there."""
        while True:
            newest = self._catalog.newest(run_ids)
            if await self.verification.all_present(newest.values()):
                return newest

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
        """Delete the files of ``directory`` unless a row still names it; if someone reads them, then afterwards."""
        if self._catalog.is_named(directory):
            return
        if self._held[directory]:
            self._unnamed.add(directory)
        else:
            delete_adapter(self._root, directory)

    @contextmanager
    def holding(self, directory: str) -> Iterator[None]:
        """Meanwhile its files stay, whatever becomes of their names."""
        self._held[directory] += 1
        try:
            yield
        finally:
            self._held[directory] -= 1
            if not self._held[directory]:
                del self._held[directory]
                if directory in self._unnamed:
                    self._unnamed.remove(directory)
                    with suppress(StorageError):  # then they are orphans: `tuft checkpoint verify` tells of them
                        self.discard(directory)

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
        *,
        saved_seq: int | None = None,
    ) -> Checkpoint:
        """Write ``state`` of ``run`` and give it that name; what had the name before is replaced at that moment.

        An external checkpoint is encrypted to ``recipients``, if any. ``saved_seq``: the operation that saves.
        """
        if path.kind == "external":
            directory = _new_directory(run, path.name)
            write = partial(write_external, recipients=recipients, min_free_bytes=self._min_free_bytes)
            written = await asyncio.to_thread(write, self._root, directory, state, run.base_model)
        else:
            directory, written = await self.write(run, path.name, state)
        moment = now()
        checkpoint = Checkpoint(
            path=path,
            tenant_id=run.tenant_id,
            base_model=run.base_model,
            spec=run.spec,
            directory=directory,
            size_bytes=written.size_bytes,
            has_optimizer=bool(state.exp_avg),
            created_at=moment,
            expires_at=_expiry(moment, ttl_seconds),
            user_metadata=dict(user_metadata),
            optimizer=run.optimizer,
            digest=written.digest,
            saved_seq=saved_seq,
        )
        try:
            replaced = self._catalog.put(checkpoint)
        except StorageError:
            with suppress(StorageError):  # then they are orphans
                self.discard(directory)
            raise
        if replaced is not None:
            with suppress(StorageError):  # the name has its new meaning by now: the save has not failed
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
            saved_seq=None,
        )
        self._catalog.put(copy)
        self._note(tenant, "save", copy, copied_from=str(source.path))

    async def write(self, run: Run, name: str, state: AdapterState) -> tuple[str, Written]:
        """Write ``state`` under a directory that no row names yet. Returns the directory and what was written."""
        directory = _new_directory(run, name)
        write = partial(write_adapter, min_free_bytes=self._min_free_bytes)
        return directory, await asyncio.to_thread(write, self._root, directory, state, run.base_model)

    async def read(self, directory: str, *, with_optimizer: bool) -> AdapterState:
        """The adapter saved there, unless a byte of it is not what was written. Raises Damaged, which the rows of the
        directory then say too; or StorageError."""
        with self.holding(directory):
            read = partial(read_adapter, with_optimizer=with_optimizer, digest=self._catalog.digest(directory))
            try:
                return await asyncio.to_thread(read, self._root, directory)
            except Damaged as error:
                self._catalog.note_verified(directory, str(error))
                raise Damaged(f"{error}; {ADVICE}") from error

    async def files(self, checkpoint: Checkpoint) -> Mapping[str, Path]:
        """What may be downloaded of it, by name."""
        return await asyncio.to_thread(files_to_hand_out, self._root, checkpoint.directory)

    async def expire(self) -> None:
        """Delete what has outlived its ttl."""
        for checkpoint in await asyncio.to_thread(self._catalog.delete_expired):
            self.discard(checkpoint.directory)
            log.info("a checkpoint has expired", path=str(checkpoint.path), tenant_id=checkpoint.tenant_id)

    async def sweep(self) -> int:
        """Delete what an earlier server left half-written. Only while nothing is being saved."""
        return await asyncio.to_thread(sweep, self._root)

    def _found(self, readers: Sequence[Tenant], tinker_path: str) -> Checkpoint:
        path = CheckpointPath.parse(tinker_path)
        for reader in readers:
            checkpoint = self._catalog.within_reach(reader, self._projects.shared_with(reader), path)
            if checkpoint is not None:
                if checkpoint.damage is not None:
                    raise Damaged(f"{checkpoint.path} is damaged: {checkpoint.damage}; {ADVICE}")
                return checkpoint
        raise _unknown(tinker_path)

    def _holder(self, access_token: str) -> Tenant:
        try:
            key = self._tenants.key(access_token)
            self._tenants.require(key, "read", "a weights_access_token")
        except (Unauthorized, Forbidden) as error:  # their statuses would mean the caller's own key
            allowed = "must be an API key of a tenant who may read the checkpoint, of scope 'read'"
            raise InvalidInput("weights_access_token", f"…{access_token[-4:]}", allowed) from error
        return key.tenant

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


def require_same(checkpoint: Checkpoint, optimizer: Optimizer) -> None:
    """Moments of one optimizer mean nothing to another."""
    if checkpoint.optimizer != optimizer:
        allowed = f"its optimizer is {checkpoint.optimizer!r}, the run's is {optimizer!r}: load the weights alone"
        raise InvalidInput("path", str(checkpoint.path), allowed)


def _unknown(tinker_path: str) -> NotFound:
    error = NotFound(f"path: no checkpoint {tinker_path!r}; list_user_checkpoints() shows yours")
    return refusing("checkpoint", tinker_path, error)


def _expiry(moment: datetime, ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else moment + timedelta(seconds=ttl_seconds)


def _new_directory(run: Run, name: str) -> str:
    return f"{run.tenant_id}/{run.run_id}/{name}-{token_hex(6)}"
