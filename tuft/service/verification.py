"""Which checkpoints are whole: one of which a file is missing, cut off or changed is found, and leaves the lists.

Files are read back from the disk when they are written, read through when they are loaded or downloaded, and in the
background once in ``storage.verify_interval_days``; names and sizes are looked at whenever a checkpoint is listed. What
was found is kept in the checkpoint's row until its files were looked at again: damage that someone mends is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import structlog

from tuft.errors import Damaged, StorageError
from tuft.records import Checkpoint, now
from tuft.sections import StorageSection
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.integrity import Stored, check_present, read_through

log = structlog.get_logger(__name__)

ADVICE = "load another checkpoint; once its files are restored, `tuft checkpoint verify` brings it back"
_DAMAGED_INTERVAL = timedelta(minutes=10)
_IDLE_S = 30.0


class Verification:
    """Disk work runs in threads, what was found is written on the event loop."""

    def __init__(self, catalog: CheckpointCatalog, root: Path, storage: StorageSection) -> None:
        self._catalog = catalog
        self._root = root
        self._interval = timedelta(days=storage.verify_interval_days)
        self._bytes_per_s = storage.verify_bytes_per_s

    async def all_present(self, checkpoints: Iterable[Checkpoint]) -> bool:
        """Whether all files of these are there in their sizes. Those of which one is not are in no list any more."""
        missing = await asyncio.to_thread(self._missing, list(checkpoints))
        for checkpoint, damage in missing:
            self.note(checkpoint, damage)
        return not missing

    async def verify(self, checkpoint: Checkpoint, bytes_per_s: float | None = None) -> None:
        """Read its files through, no faster than that on average. Raises Damaged, which its row then says too; or
        StorageError."""
        parts = read_through(self._root, stored(checkpoint))
        try:
            if bytes_per_s is None:
                await asyncio.to_thread(sum, parts)
            else:
                await _paced(parts, bytes_per_s)
        except Damaged as error:
            self.note(checkpoint, str(error))
            raise
        self.note(checkpoint, None)

    async def serve(self) -> None:
        """Verify one after the other, those first that were not looked at for longest; runs until cancelled."""
        while True:
            checkpoint = None
            try:
                checkpoint = self._catalog.to_verify(now() - self._interval, now() - _DAMAGED_INTERVAL)
                if checkpoint is not None:
                    await self.verify(checkpoint, self._bytes_per_s)
            except Damaged:
                continue
            except StorageError as error:
                log.error("checkpoints could not be verified", error=str(error))
                checkpoint = None
            if checkpoint is None:
                await asyncio.sleep(_IDLE_S)

    def note(self, checkpoint: Checkpoint, damage: str | None) -> bool:
        """Keep what was found; False if the files have no name any more, and nothing of it matters."""
        is_named = self._catalog.note_verified(checkpoint.directory, damage)
        if is_named and damage != checkpoint.damage:
            about = {"path": str(checkpoint.path), "tenant_id": checkpoint.tenant_id}
            if damage is None:
                log.info("a damaged checkpoint is whole again", **about)
            else:
                log.error("a checkpoint is damaged", damage=damage, **about)
        return is_named

    def _missing(self, checkpoints: Iterable[Checkpoint]) -> list[tuple[Checkpoint, str]]:
        missing = []
        for checkpoint in checkpoints:
            try:
                check_present(self._root, stored(checkpoint))
            except Damaged as error:
                missing.append((checkpoint, str(error)))
        return missing


async def _paced(parts: Iterator[int], bytes_per_s: float) -> None:
    while True:
        num_bytes = await asyncio.to_thread(next, parts, 0)
        if not num_bytes:
            return
        await asyncio.sleep(num_bytes / bytes_per_s)


def stored(checkpoint: Checkpoint) -> Stored:
    """What the row says of the files."""
    return Stored(checkpoint.directory, checkpoint.digest, checkpoint.size_bytes)
