from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tuft import garbage


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def num_full() -> int:
    return int(gc.get_stats()[2]["collections"])


def test_however_many_objects_there_are_not_all_are_looked_at() -> None:
    garbage.settle()
    before, kept = num_full(), []
    for _ in range(500_000):
        kept.append([Cycle()])
    assert num_full() == before
    assert len(kept) == 500_000


async def test_cycles_are_collected_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_INTERVAL_S", 0.01)
    garbage.settle()
    before = num_full()
    serving = asyncio.create_task(garbage.serve())
    while num_full() == before:
        await asyncio.sleep(0.01)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
