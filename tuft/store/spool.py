"""Large requests and results of futures, a file each. Small ones are in the rows themselves."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tuft.errors import Damaged, StorageError

INLINE_BYTES = 16 * 1024
"""What is longer gets a file: rows stay short, so that reading many is quick."""

Content = Literal["request", "result"]


class Spool:
    """Files of ``root``, named by their futures. A row is written only when its file is on the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[Path] = set()

    def write(self, future_id: str, content: Content, value: bytes) -> None:
        """Raises StorageError; nothing stays then."""
        path = self._path(future_id, content)
        try:
            self._make(path.parent)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.delete(future_id, content)
            raise StorageError(f"{len(value)} bytes of a {content} could not be journaled: {error.strerror}") from error

    def read(self, future_id: str, content: Content) -> bytes:
        """Raises Damaged if the file is gone, StorageError for what may pass: a disk that is not mounted, say."""
        try:
            return self._path(future_id, content).read_bytes()
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError) and self._root.is_dir()
            kind = Damaged if is_gone else StorageError
            raise kind(f"the {content} of {future_id} cannot be read: {error.strerror}") from error

    def delete(self, future_id: str, content: Content) -> None:
        """One that is not there is fine; what cannot be deleted now is swept by the next server."""
        with suppress(OSError):
            self._path(future_id, content).unlink(missing_ok=True)

    def names(self) -> set[tuple[str, str]]:
        """Future and content of every file."""
        return {(path.stem, path.suffix[1:]) for path in self._root.glob("*/*")}

    def _path(self, future_id: str, content: Content) -> Path:
        return self._root / future_id[-2:] / f"{future_id}.{content}"

    def _make(self, directory: Path) -> None:
        if directory in self._made:
            return
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in (directory, self._root):
            descriptor = os.open(made.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._made.add(directory)
