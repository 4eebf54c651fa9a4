"""Checkpoints on their way into runs, on a real engine and both databases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.records import Session, Tenant
from tuft.service.services import Services
from tuft.types import AdamParams, Datum, Failure, LoraSpec, LossResult, WeightsLoaded

DATUM = Datum(np.asarray([1, 2, 3, 4]), {"target_tokens": np.asarray([2, 3, 4, 5])})


@pytest.fixture
async def run_id(services: Services, alice: Tenant, session: Session, settled: Settled) -> str:
    """A run that was saved as "x" before its second step; its next seq is 6."""
    run_id = f"{session.session_id}:train:0"
    await settled(await services.runs.create(alice, session.session_id, 0, TINY_MODEL, LoraSpec(rank=2, seed=1), {}))
    for seq in (1, 4):
        await loss(services, alice, run_id, seq, settled)
        await services.operations.optim_step(alice, run_id, seq + 1, AdamParams(learning_rate=0.1))
        if seq == 1:
            await settled(await services.operations.save_weights(alice, run_id, 3, "x", None, False, {}))
    return run_id


async def loss(services: Services, alice: Tenant, run_id: str, seq: int, settled: Settled, back: bool = True) -> float:
    future_id = await services.operations.forward_backward(alice, run_id, seq, (DATUM,), "cross_entropy", {}, back)
    result = await settled(future_id)
    assert isinstance(result, LossResult), result
    return result.metrics["loss:sum"]


def block(services: Services, run_id: str) -> Path:
    """A disk that takes no snapshot of the run, until the file returned is deleted."""
    place = services.config.home / "snapshots" / run_id
    place.parent.mkdir(exist_ok=True)
    place.write_text("no directory")
    return place


async def test_a_load_gives_back_what_was_saved(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    stepped = await loss(services, alice, run_id, 6, settled, back=False)
    path = f"tinker://{run_id}/weights/x"
    loaded = await settled(await services.operations.load_weights(alice, run_id, 7, path, True, None))
    assert loaded == WeightsLoaded(path, run_id)
    saved = await loss(services, alice, run_id, 8, settled)
    assert saved != stepped
    await services.operations.optim_step(alice, run_id, 9, AdamParams(learning_rate=0.1))
    assert await loss(services, alice, run_id, 10, settled, back=False) == stepped


async def test_a_load_that_the_disk_does_not_take_has_changed_nothing(
    services: Services, alice: Tenant, run_id: str, settled: Settled
) -> None:
    before = await loss(services, alice, run_id, 6, settled, back=False)
    place = block(services, run_id)
    path = f"tinker://{run_id}/weights/x"
    failed = await settled(await services.operations.load_weights(alice, run_id, 7, path, True, None))
    assert isinstance(failed, Failure)
    assert "could not be written" in failed.message
    assert await loss(services, alice, run_id, 8, settled, back=False) == before
    place.unlink()
    loaded = await settled(await services.operations.load_weights(alice, run_id, 9, path, True, None))
    assert isinstance(loaded, WeightsLoaded)
    assert await loss(services, alice, run_id, 10, settled, back=False) != before


async def test_a_run_that_the_disk_does_not_take_is_not_begun(
    services: Services, alice: Tenant, session: Session, run_id: str, settled: Settled
) -> None:
    place = block(services, f"{session.session_id}:train:1")
    num_resident = services.residency.num_resident
    beginning = (alice, session.session_id, 1, f"tinker://{run_id}/weights/x", True, None, {}, None)
    failed = await settled(await services.runs.create_from_checkpoint(*beginning))
    assert isinstance(failed, Failure)
    assert services.runs.get(alice, f"{session.session_id}:train:1").status == "failed"
    assert services.residency.num_resident == num_resident
    place.unlink()
