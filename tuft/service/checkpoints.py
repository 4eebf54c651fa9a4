"""Saved adapters: their names, their owners, and what is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from secrets import token_hex

from tuft.errors import InvalidInput, NotFound
from tuft.records import Checkpoint, CheckpointPath, Run, Tenant, now
from tuft.store.catalog import Catalog
from tuft.store.weights import delete_adapter, read_adapter, sweep, write_adapter
from tuft.types import AdapterState, CheckpointKind


class Checkpoints:
    """Training and sampler checkpoints of one name are two things. Disk work runs in threads."""

    def __init__(self, catalog: Catalog, root: Path) -> None:
        self._catalog = catalog
        self._root = root

    def get(self, tenant: Tenant, tinker_path: str) -> Checkpoint:
        """The tenant's checkpoint at that path. Raises InvalidInput for a path of another shape, else NotFound."""
        checkpoint = self._catalog.checkpoint(tenant, CheckpointPath.parse(tinker_path))
        if checkpoint is None:
            raise NotFound(f"path: no checkpoint {tinker_path!r}; list_user_checkpoints() shows yours")
        return checkpoint

    def list(self, tenant: Tenant, run_id: str | None, limit: int, offset: int) -> tuple[list[Checkpoint], int]:
        """One page, newest first, and the number of all."""
        return self._catalog.checkpoints(tenant, limit, offset, run_id)

    def last(self, tenant: Tenant, run_id: str) -> tuple[Checkpoint | None, Checkpoint | None]:
        """The run's newest training checkpoint and its newest sampler checkpoint."""
        training, _ = self._catalog.checkpoints(tenant, 1, 0, run_id, "training")
        sampler, _ = self._catalog.checkpoints(tenant, 1, 0, run_id, "sampler")
        return (training[0] if training else None), (sampler[0] if sampler else None)

    def delete(self, tenant: Tenant, tinker_path: str) -> None:
        """Forget the name; its files go too, unless a sampler still reads them."""
        checkpoint = self.get(tenant, tinker_path)
        self._catalog.delete_checkpoint(checkpoint.path)
        self.discard(checkpoint.directory)

    def discard(self, directory: str) -> None:
        """Delete the files of ``directory`` unless a row still names it."""
        if directory not in self._catalog.live_directories():
            delete_adapter(self._root, directory)

    def require_free(self, tenant: Tenant, path: CheckpointPath) -> None:
        """Raises InvalidInput if the name is taken."""
        if self._catalog.checkpoint(tenant, path) is not None:
            raise InvalidInput("path", path.name, f"{path} exists already; pass overwrite=True or another name")

    async def save(
        self,
        run: Run,
        kind: CheckpointKind,
        name: str,
        state: AdapterState,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, str],
    ) -> Checkpoint:
        """Write ``state`` and give it the name; an older one of that name and kind is replaced at that moment."""
        path = CheckpointPath(run.run_id, kind, name)
        directory, size_bytes = await self.write(run, name, state)
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
            expires_at=None if ttl_seconds is None else moment + timedelta(seconds=ttl_seconds),
            user_metadata=dict(user_metadata),
        )
        replaced = self._catalog.put_checkpoint(checkpoint)
        if replaced is not None:
            self.discard(replaced)
        return checkpoint

    async def write(self, run: Run, name: str, state: AdapterState) -> tuple[str, int]:
        """Write ``state`` under a directory that no row names yet. Returns the directory and its bytes."""
        directory = f"{run.tenant_id}/{run.run_id}/{name}-{token_hex(6)}"
        return directory, await asyncio.to_thread(write_adapter, self._root, directory, state, run.base_model)

    async def read(self, directory: str, *, with_optimizer: bool) -> AdapterState:
        return await asyncio.to_thread(read_adapter, self._root, directory, with_optimizer=with_optimizer)

    def expire(self) -> None:
        """Delete what has outlived its ttl."""
        for directory in self._catalog.delete_expired_checkpoints():
            self.discard(directory)

    async def sweep(self) -> int:
        """Delete what an earlier server left half-written. Only while nothing is being saved."""
        return await asyncio.to_thread(sweep, self._root)
