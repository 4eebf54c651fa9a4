"""Checkpoints as the operator sees them: everyone's, the damaged ones too, and what has no name any more. Works beside
a running server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from tuft.errors import Damaged, InvalidInput, NotFound
from tuft.records import Checkpoint, CheckpointPath
from tuft.service.verification import stored
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.integrity import read_through
from tuft.store.tenants import TenantCatalog
from tuft.store.weights import Orphan, delete_adapter, find_orphans


class Inspection:
    def __init__(self, catalog: CheckpointCatalog, tenants: TenantCatalog, root: Path) -> None:
        self._catalog = catalog
        self._tenants = tenants
        self._root = root

    def checkpoints(self, tenant_name: str | None = None, paths: Collection[str] | None = None) -> list[Checkpoint]:
        """Those of that tenant, or of all; of these ``paths``, if any are given. Raises InvalidInput or NotFound."""
        tenant = None if tenant_name is None else self._tenants.named(tenant_name)
        if tenant_name is not None and tenant is None:
            raise NotFound(f"tenant: no tenant {tenant_name!r}; `tuft tenant list` shows all")
        found = self._catalog.all(None if tenant is None else tenant.tenant_id)
        if not paths:
            return found
        wanted = {CheckpointPath.parse(path) for path in paths}
        unknown = wanted - {checkpoint.path for checkpoint in found}
        if unknown:
            raise NotFound(f"path: no checkpoint {min(map(str, unknown))}; `tuft checkpoint list` shows all")
        return [checkpoint for checkpoint in found if checkpoint.path in wanted]

    def verify(self, checkpoint: Checkpoint, on_read: Callable[[int], object]) -> Checkpoint | None:
        """Read its files through and keep in its row what was found; ``on_read`` is told the bytes of each part. None
        if it was deleted or replaced meanwhile. Raises StorageError if the disk or the database does not answer."""
        damage = None
        try:
            for num_bytes in read_through(self._root, stored(checkpoint)):
                on_read(num_bytes)
        except Damaged as error:
            damage = str(error)
        is_named = self._catalog.note_verified(checkpoint.directory, damage)
        return replace(checkpoint, damage=damage) if is_named else None

    def orphans(self) -> list[Orphan]:
        """Directories that neither a checkpoint nor a sampler names."""
        return find_orphans(self._root, self._catalog.named_directories)

    def delete_orphans(self, orphans: Sequence[Orphan]) -> None:
        """Raises InvalidInput where the database names nothing: it is hardly the one of this home."""
        if orphans and not self._catalog.named_directories():
            allowed = "this database names no checkpoint at all, and so may be another home's: delete them yourself"
            raise InvalidInput("delete_orphans", True, allowed)
        for orphan in orphans:
            delete_adapter(self._root, orphan.directory)
