"""Adapters that a GPU has no room for wait in the host's memory: those used longest ago leave first."""

from __future__ import annotations

from collections.abc import Collection

import torch

from tuft.models.lora import Adapter


class Pager:
    """Keeps what adapters hold on ``device`` within ``max_bytes``. What is in use stays whatever it holds: a pass of
    more adapters than fit is computed all the same, if the device can."""

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._resident: dict[Adapter, None] = {}  # in the order of their last use

    @property
    def resident(self) -> tuple[Adapter, ...]:
        """Those on the device; the one used longest ago is the first."""
        return tuple(self._resident)

    def fetch(self, adapter: Adapter, in_use: Collection[Adapter]) -> None:
        """``adapter`` is wanted on the device: others than it and those ``in_use`` make room if they must."""
        self._resident.pop(adapter, None)
        excess = adapter.num_bytes + sum(other.num_bytes for other in self._resident) - self._max_bytes
        for other in list(self._resident):
            if excess <= 0:
                break
            if other not in in_use:
                excess -= other.num_bytes
                other.move_to_host()
                del self._resident[other]
        adapter.move_to(self._device)
        self._resident[adapter] = None

    def forget(self, adapter: Adapter) -> None:
        self._resident.pop(adapter, None)
