"""Memory for kernels: apart from each other, at lines, and no more than was ever wanted."""

from __future__ import annotations

import torch

from tuft.models.workspace import Workspace


def test_parts_begin_at_lines_and_do_not_overlap() -> None:
    sizes = [1, 64, 65, 0, 200]
    addresses = Workspace().parts(sizes)
    assert all(address % 64 == 0 for address in addresses)
    for address, size, following in zip(addresses, sizes, addresses[1:], strict=False):
        assert address + size <= following < address + size + 64


def test_every_thread_has_lines_of_its_own() -> None:
    workspace = Workspace()
    address, each = workspace.of_threads(100)
    assert (address % 64, each) == (0, 128)
    assert len(workspace._memory) >= 128 * torch.get_num_threads()


def test_memory_is_kept_until_more_is_wanted() -> None:
    workspace = Workspace()
    (first,) = workspace.parts([1000])
    assert workspace.parts([10, 20])[0] == first
    workspace.parts([100_000])
    assert len(workspace._memory) >= 100_000
