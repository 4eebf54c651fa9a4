"""Memory that kernels need while they run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

_LINE_BYTES = 64
"""A cache line: two threads that write to one wait for each other."""


class Workspace:
    """Grows to the most that was ever wanted. Shared by calls that follow each other: what one leaves, the next may
    overwrite."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def parts(self, sizes: Sequence[int]) -> list[int]:
        """Addresses of as many bytes each, all at the beginning of a line."""
        *starts, num_bytes = accumulate((_lines(size) for size in sizes), initial=0)
        if len(self._memory) < num_bytes + _LINE_BYTES:
            self._memory = torch.empty(num_bytes + _LINE_BYTES, dtype=torch.uint8)
        first = _lines(self._memory.data_ptr())
        return [first + start for start in starts]

    def of_threads(self, num_bytes: int) -> tuple[int, int]:
        """``num_bytes`` for every thread of the team: address of the first's, and the bytes from one to the next."""
        each = _lines(num_bytes)
        (address,) = self.parts([each * torch.get_num_threads()])
        return address, each


def _lines(size: int) -> int:
    return -(-size // _LINE_BYTES) * _LINE_BYTES
