"""How fast base models are trained here: tokens, and the time in which at least one of them was being computed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from tuft.errors import StorageError
from tuft.store.paces import PaceTable

_MEMORY_S = 600.0
"""Seconds of computing that are remembered; older ones fade, so that the pace is one of late."""


@dataclass(slots=True)
class _Measured:
    num_tokens: float = 0.0
    busy_s: float = 0.0
    until_s: float = 0.0
    is_new: bool = False


class Pace:
    """Operations of many tenants are computed together: their times are joined, not added."""

    def __init__(self, table: PaceTable) -> None:
        self._table = table
        self._models: dict[str, _Measured] = defaultdict(_Measured)

    def trained(self, base_model: str, num_tokens: int, started_s: float, settled_s: float) -> None:
        """An operation of so many tokens was computed between these moments, seconds since any epoch."""
        measured = self._models[base_model]
        measured.num_tokens += num_tokens
        measured.busy_s += max(settled_s - max(started_s, measured.until_s), 0.0)
        measured.until_s = max(measured.until_s, settled_s)
        measured.is_new = True
        if measured.busy_s > _MEMORY_S:
            kept = _MEMORY_S / measured.busy_s
            measured.num_tokens, measured.busy_s = measured.num_tokens * kept, _MEMORY_S

    async def keep(self) -> None:
        """Write down what was measured since the last time, for ``tuft estimate`` beside this server or after it."""
        for base_model, measured in list(self._models.items()):
            if measured.is_new and measured.busy_s > 0:
                measured.is_new = False
                row = (base_model, round(measured.num_tokens), max(round(measured.busy_s * 1000), 1))
                try:
                    await asyncio.to_thread(self._table.put, *row)
                except StorageError:
                    measured.is_new = True
                    raise
