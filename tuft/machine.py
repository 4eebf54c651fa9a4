"""What this machine, or the container that we run in, has of memory."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 2**60
"""Control groups of version 1 say "no limit" as a number like this, or larger."""


def memory_bytes(root: Path = _ROOT) -> int:
    """The machine's memory, or the least that a control group above this process allows. It does not depend on what
    is in use: what was decided by it is decided alike after a restart. ``root``: where Linux has /proc and /sys."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits(root)])


def _limits(root: Path) -> list[int]:
    found = []
    for file in _limit_files(root):
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue  # not there: no limit of this group
        if text.isdecimal() and int(text) < _UNLIMITED:
            found.append(int(text))
    return found


def _limit_files(root: Path) -> list[Path]:
    """Of this process's groups and all above them, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, name = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("sys/fs/cgroup", "memory.max")
        )
        group = Path(path.lstrip("/"))
        # in a container the path may be the host's, and the container's own group the root
        files += [root / folder / one / name for one in (group, *group.parents) if ".." not in one.parts]
    return files
