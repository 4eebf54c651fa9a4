"""The journal's writer, as the event loop has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from tuft.errors import StorageError
from tuft.store.journal import Flushed, Journal, Note
from tuft.store.journal_writer import JournalWriter

_MAX_WRITING_S = 10.0
"""How long somebody who only looks waits for what is being written."""

Told = Callable[[StorageError | None], None]


class Writing:
    """Notes are written in the order given. ``make`` is called from the writer's thread: encoding takes time."""

    def __init__(self, journal: Journal) -> None:
        self._writer = JournalWriter(journal)
        self._unwritten: set[asyncio.Future[None]] = set()

    def start(self) -> None:
        self._writer.start()

    def close(self) -> None:
        """Write what waits, and end. Blocks."""
        self._writer.close()

    def submit(self, make: Callable[[], Note], told: Told) -> None:
        """Write a note; ``told`` is called on the loop, with the error if it never will be written."""
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        self._unwritten.add(written)

        def on_loop(error: StorageError | None) -> None:
            self._unwritten.discard(written)
            if not written.done():
                written.set_result(None)
            told(error)

        self._writer.submit(make, partial(_tell, loop, on_loop))

    async def write(self, make: Callable[[], Note]) -> None:
        """The note is in the journal, behind all that were given before. Raises StorageError."""
        written: asyncio.Future[StorageError | None] = asyncio.get_running_loop().create_future()

        def told(error: StorageError | None) -> None:
            if not written.done():  # whoever asked may have gone
                written.set_result(error)

        self.submit(make, told)
        if (error := await written) is not None:
            raise error

    async def flush(self) -> None:
        """All notes so far are in the journal, however long that takes."""
        await self.write(Flushed)

    async def settled(self) -> None:
        """All notes so far are in the journal; or the database has kept us too long."""
        if self._unwritten:
            await asyncio.wait(set(self._unwritten), timeout=_MAX_WRITING_S)


def _tell(loop: asyncio.AbstractEventLoop, told: Told, error: StorageError | None) -> None:
    """From the writer's thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(told, error)
