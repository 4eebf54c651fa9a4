from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuft.machine import memory_bytes

MIB = 2**20
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="ascii")


def test_this_machine_has_no_more_than_the_kernel_says() -> None:
    assert 2**28 < memory_bytes() <= MACHINE


def test_where_there_are_no_control_groups_it_is_all_of_the_machine(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == MACHINE


@pytest.mark.parametrize("path", ["/", "/system.slice/tuft.service"])
def test_a_container_has_what_its_group_allows(tmp_path: Path, path: str) -> None:
    """Version 2; in a container the group is often named as the host names it, and found at the root."""
    put(tmp_path / "proc/self/cgroup", f"0::{path}\n")
    put(tmp_path / "sys/fs/cgroup/memory.max", f"{2 * MIB}\n")
    assert memory_bytes(tmp_path) == 2 * MIB


def test_the_least_that_a_group_above_allows_counts(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    put(tmp_path / "sys/fs/cgroup/a/b/memory.max", f"{4 * MIB}\n")
    put(tmp_path / "sys/fs/cgroup/a/memory.max", f"{3 * MIB}\n")
    put(tmp_path / "sys/fs/cgroup/memory.max", "max\n")
    assert memory_bytes(tmp_path) == 3 * MIB


def test_groups_of_version_1_are_read_too_and_their_no_limit_is_none(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "12:cpu,cpuacct:/x\n4:memory:/docker/1\n")
    put(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert memory_bytes(tmp_path) == MACHINE
    put(tmp_path / "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", f"{MIB}\n")
    assert memory_bytes(tmp_path) == MIB


def test_a_group_that_leads_out_of_its_root_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/../other\n")
    put(tmp_path / "sys/fs/other/memory.max", f"{MIB}\n")
    assert memory_bytes(tmp_path) == MACHINE
