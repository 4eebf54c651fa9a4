"""Files as one tar, which is made while it is read and held nowhere."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from tuft.errors import StorageError
from tuft.store.confined import open_plain, plain_file

_BLOCK = tarfile.BLOCKSIZE
_PART_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Archive:
    """``members`` are a tar header and the file that follows it, or None for an empty one."""

    members: tuple[tuple[tarfile.TarInfo, Path | None], ...]

    @classmethod
    def of(cls, files: Mapping[str, Path | None]) -> Archive:
        """Raises StorageError if a file is not there, Damaged if it is a link or a device."""
        members = []
        for name, path in files.items():
            info = tarfile.TarInfo(name)
            if path is not None:
                try:
                    status = plain_file(path)
                except OSError as error:
                    raise StorageError(f"{path} cannot be read: {error.strerror}") from error
                info.size, info.mtime = status.st_size, int(status.st_mtime)
            members.append((info, path))
        return cls(tuple(members))

    @property
    def size_bytes(self) -> int:
        return sum(len(info.tobuf()) + info.size + _padding(info.size) for info, _ in self.members) + 2 * _BLOCK

    def parts(self) -> Iterator[bytes]:
        """All its bytes, in order. The files are opened at once: one that is deleted meanwhile is read to its end."""
        with ExitStack() as stack:
            files = [
                stack.enter_context(os.fdopen(open_plain(path), "rb") if path else BytesIO())
                for _, path in self.members
            ]
            for (info, _), file in zip(self.members, files, strict=True):
                yield info.tobuf()
                left = info.size
                while part := file.read(min(_PART_BYTES, left)):
                    left -= len(part)
                    yield part
                if left:
                    raise StorageError(f"{info.name} became shorter while it was sent")
                yield bytes(_padding(info.size))
            yield bytes(2 * _BLOCK)


def _padding(size: int) -> int:
    return -size % _BLOCK
