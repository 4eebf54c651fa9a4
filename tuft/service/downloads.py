"""Checkpoints' files for whoever holds a link to one: no key is needed, and an hour later it is worth nothing."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tuft.errors import Damaged, InvalidInput, NotFound, refusing
from tuft.records import Checkpoint, CheckpointPath, Tenant
from tuft.service.checkpoints import Checkpoints
from tuft.service.signing import Signer
from tuft.service.verification import ADVICE
from tuft.store.archive import Archive
from tuft.store.integrity import COMPLETE

LINK_LIFETIME_S = 3600
ARCHIVE = "archive.tar"


@dataclass(frozen=True, slots=True)
class Link:
    """``file`` is one of the checkpoint's, or ``archive.tar`` for all of them; ``expires_at_s`` is Unix time."""

    path: CheckpointPath
    file: str
    expires_at_s: int
    signature: str


@dataclass(frozen=True, slots=True)
class Download:
    """What is at the end of a link. Its files stay until ``held`` is closed, whatever becomes of the checkpoint."""

    content: Path | Archive
    held: ExitStack


class Downloads:
    """A link is to a file as it is when the link is made: if the name changes its meaning, the link has none."""

    def __init__(self, checkpoints: Checkpoints, signer: Signer) -> None:
        self._checkpoints = checkpoints
        self._signer = signer

    async def links(self, tenant: Tenant, tinker_path: str) -> list[Link]:
        """One for each file of an external checkpoint, after they were read through. Raises InvalidInput for another
        kind, NotFound, or Damaged."""
        checkpoint = self._checkpoints.get(tenant, tinker_path)
        if checkpoint.path.kind != "external":
            raise InvalidInput("path", tinker_path, "must be external weights; save_weights_external() makes them")
        await self._read_through(tenant, checkpoint)
        return [self._link(checkpoint, file) for file in await self._checkpoints.files(checkpoint)]

    async def archive(self, tenant: Tenant, tinker_path: str) -> Link:
        """To a tar of a checkpoint of any kind, without its optimizer, after it was read through."""
        checkpoint = self._checkpoints.get(tenant, tinker_path)
        await self._read_through(tenant, checkpoint)
        return self._link(checkpoint, ARCHIVE)

    async def follow(self, link: Link) -> Download:
        """What is at its end. Raises NotFound for a link that is forged, has expired, or leads nowhere any more."""
        checkpoint = self._checkpoints.at(link.path)
        directory = "" if checkpoint is None else checkpoint.directory  # the same work whether there is one or not
        is_ours = self._signer.verifies(
            link.signature, *_signed(link.path, link.file, directory), expires_at_s=link.expires_at_s
        )
        if checkpoint is None or not is_ours:
            error = NotFound("this link is not one of this server's, or is no longer good; ask for a new one")
            raise refusing("link", str(link.path), error)
        with ExitStack() as held:
            held.enter_context(self._checkpoints.holding(checkpoint.directory))
            files = await self._checkpoints.files(checkpoint)
            if link.file == ARCHIVE:
                archive = await asyncio.to_thread(Archive.of, {**files, COMPLETE: files.get(COMPLETE)})
                return Download(archive, held.pop_all())
            if link.file not in files:
                raise Damaged(f"{checkpoint.path} is damaged: {link.file} is missing; {ADVICE}")
            return Download(files[link.file], held.pop_all())

    async def _read_through(self, tenant: Tenant, checkpoint: Checkpoint) -> None:
        self._checkpoints.note_read(tenant, checkpoint, "download")
        with self._checkpoints.holding(checkpoint.directory):
            await self._checkpoints.verification.verify(checkpoint)

    def _link(self, checkpoint: Checkpoint, file: str) -> Link:
        expires_at_s = int(time.time()) + LINK_LIFETIME_S
        signature = self._signer.sign(*_signed(checkpoint.path, file, checkpoint.directory), expires_at_s=expires_at_s)
        return Link(checkpoint.path, file, expires_at_s, signature)


def _signed(path: CheckpointPath, file: str, directory: str) -> tuple[str, ...]:
    return str(path), file, directory
