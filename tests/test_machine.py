from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuft.machine import memory_bytes

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 8 GiB without control groups."""
    put(tmp_path / "proc/meminfo", f"MemTotal:       {8 * GIB // 1024} kB\nMemFree:        1 kB\n")
    return tmp_path


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="ascii")


def test_this_machine_has_no_more_than_the_kernel_says() -> None:
    assert 2**28 < memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_without_control_groups_it_is_all_of_the_machine(root: Path) -> None:
    assert memory_bytes(root) == 8 * GIB


@pytest.mark.parametrize("path", ["/", "/system.slice/tuft.service"])
def test_a_container_has_what_its_group_allows(root: Path, path: str) -> None:
    """Version 2; in a container the group is often named as the host names it, and found at the root."""
    put(root / "proc/self/cgroup", f"0::{path}\n")
    put(root / "sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    assert memory_bytes(root) == 2 * GIB


def test_the_least_that_a_group_above_allows_counts(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/a/b\n")
    put(root / "sys/fs/cgroup/a/b/memory.max", f"{4 * GIB}\n")
    put(root / "sys/fs/cgroup/a/memory.max", f"{3 * GIB}\n")
    put(root / "sys/fs/cgroup/memory.max", "max\n")
    assert memory_bytes(root) == 3 * GIB


def test_groups_of_version_1_are_read_too_and_their_no_limit_is_none(root: Path) -> None:
    put(root / "proc/self/cgroup", "12:cpu,cpuacct:/x\n4:memory:/docker/1\n")
    put(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert memory_bytes(root) == 8 * GIB
    put(root / "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", f"{GIB}\n")
    assert memory_bytes(root) == GIB


def test_a_group_that_leads_out_of_its_root_is_not_followed(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/../other\n")
    put(root / "sys/fs/other/memory.max", f"{GIB}\n")
    assert memory_bytes(root) == 8 * GIB
