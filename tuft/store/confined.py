"""What is read or deleted below the directory of all checkpoints stays below it: no link is followed there.

The root itself may be a link, as whoever runs the server likes; what is below it is the server's own, which makes plain
directories and files alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from tuft.errors import Damaged


def confined(root: Path, directory: str) -> Path:
    """``root/directory``. Raises Damaged if a link is on the way there, or it would not lie below ``root``; whether it
    is there is for the caller to see."""
    relative = PurePosixPath(directory)
    parts = relative.parts
    if not parts or relative.is_absolute() or ".." in parts or "\0" in directory:
        raise Damaged(f"{directory!r} is no directory of a checkpoint")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise Damaged(f"{directory} is damaged: a link has been put in its place")
    return path


def plain_file(path: Path) -> os.stat_result:
    """The status of a file that is neither link nor device nor pipe; Damaged for anything else. Raises OSError."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path.name} is damaged: it is not a plain file")
    return status


def open_plain(path: Path) -> int:
    """A descriptor to read it by, and never what a link leads to. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
