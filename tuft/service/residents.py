"""Which frozen adapters the engine holds.

There an adapter goes by the directory its weights are saved in: what a directory holds never changes, so neither does
what a sampler made from it says.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from tuft.engine.base import DropAdapter, Engine, LoadAdapter
from tuft.service.checkpoints import Checkpoints
from tuft.service.scheduler import Scheduler


class Residents:
    """Frozen adapters of all tenants, at most ``max_resident`` of them; the others come back from disk."""

    def __init__(self, engine: Engine, scheduler: Scheduler, checkpoints: Checkpoints, max_resident: int) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._checkpoints = checkpoints
        self._max_resident = max_resident
        self._generations: OrderedDict[str, int] = OrderedDict()  # directory -> engine generation; least used first
        self._loading: dict[str, asyncio.Task[None]] = {}

    def note(self, directory: str) -> None:
        """The engine holds the adapter of ``directory`` now; beyond the limit, the least used one leaves."""
        self._generations[directory] = self._engine.generation
        self._generations.move_to_end(directory)
        while len(self._generations) > self._max_resident:
            leaving, _ = self._generations.popitem(last=False)
            self._engine.submit([DropAdapter(leaving)])

    def use(self, directory: str) -> bool:
        """True if the engine holds it at this moment."""
        if self._generations.get(directory) != self._engine.generation:
            return False
        self._generations.move_to_end(directory)
        return True

    async def load(self, directory: str, base_model: str) -> None:
        """Have the engine hold it, if perhaps not for long."""
        if directory not in self._loading:  # whoever comes while it loads waits for the same load
            task = asyncio.get_running_loop().create_task(self._load(directory, base_model))
            task.add_done_callback(lambda _: self._loading.pop(directory))
            self._loading[directory] = task
        await asyncio.shield(self._loading[directory])

    async def loaded(self, directory: str) -> None:
        """Returns once nobody loads it."""
        if directory in self._loading:
            await asyncio.wait([self._loading[directory]])

    def discard(self, directory: str) -> None:
        """No sampler uses it any more."""
        self._checkpoints.discard(directory)
        if self._generations.pop(directory, None) is not None:
            self._engine.submit([DropAdapter(directory)])

    async def _load(self, directory: str, base_model: str) -> None:
        state = await self._checkpoints.read(directory, with_optimizer=False)
        await self._scheduler.replies.ask(LoadAdapter(directory, base_model, state, trainable=False))
        self.note(directory)
