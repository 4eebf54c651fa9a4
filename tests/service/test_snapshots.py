"""States of runs on the disk, on a real engine and both databases."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY_MODEL
from tests.service.conftest import Settled
from tuft.errors import StorageError
from tuft.records import Run, Session, Snapshot, Tenant
from tuft.service.services import Services
from tuft.types import AdamParams, AdapterState, Datum, Failure, LoraSpec

DATUM = Datum(np.asarray([1, 2, 3, 4]), {"target_tokens": np.asarray([2, 3, 4, 5])})


class Ran:
    """A run, one operation after the other."""

    def __init__(self, services: Services, tenant: Tenant, run: Run, settled: Settled) -> None:
        self.services, self.tenant, self.run, self.settled = services, tenant, run, settled
        self.seq = 0

    @property
    def directories(self) -> list[str]:
        return directories(self.services, self.run.run_id)

    @property
    def snapshot(self) -> Snapshot:
        found = self.services._journal.snapshot(self.run.run_id)
        assert found is not None
        return found

    async def backward(self) -> None:
        self.seq += 1
        data = (self.tenant, self.run.run_id, self.seq, (DATUM,), "cross_entropy", {}, True)
        await self._done(await self.services.operations.forward_backward(*data))

    async def step(self) -> None:
        self.seq += 1
        params = AdamParams(learning_rate=0.1)
        await self._done(await self.services.operations.optim_step(self.tenant, self.run.run_id, self.seq, params))

    async def save(self) -> str:
        self.seq += 1
        saving = (self.tenant, self.run.run_id, self.seq, "x", None, False, {})
        await self._done(await self.services.operations.save_weights(*saving))
        return f"tinker://{self.run.run_id}/weights/x"

    async def load(self, path: str) -> None:
        self.seq += 1
        loading = (self.tenant, self.run.run_id, self.seq, path, True, None)
        await self._done(await self.services.operations.load_weights(*loading))

    async def state(self) -> AdapterState:
        """What its snapshot holds."""
        return await self.services._snapshots.read(self.snapshot)

    async def _done(self, future_id: str) -> None:
        assert not isinstance(await self.settled(future_id), Failure)


@pytest.fixture
async def ran(services: Services, alice: Tenant, session: Session, settled: Settled) -> Ran:
    return await begin(services, alice, session, settled, 0)


async def begin(services: Services, alice: Tenant, session: Session, settled: Settled, number: int) -> Ran:
    spec = LoraSpec(rank=2, seed=7)
    await settled(await services.runs.create(alice, session.session_id, number, TINY_MODEL, spec, {}))
    return Ran(services, alice, services.runs.get(alice, f"{session.session_id}:train:{number}"), settled)


def directories(services: Services, run_id: str = "*") -> list[str]:
    root = services.config.home / "snapshots"
    return sorted(str(path.relative_to(root)) for path in root.glob(f"{run_id}/*"))


async def test_a_snapshot_has_weights_moments_step_and_gradients_up_to_its_seq(services: Services, ran: Ran) -> None:
    await ran.backward()
    await ran.step()
    await ran.backward()
    assert await services._snapshots.take(ran.run)
    assert (ran.snapshot.seq, [ran.snapshot.directory]) == (3, ran.directories)
    state = await ran.state()
    assert state.step == 1
    for part in (state.weights, state.exp_avg, state.exp_avg_sq, state.gradients):
        assert any(array.any() for array in part.values())


async def test_a_newer_snapshot_replaces_the_older(services: Services, ran: Ran) -> None:
    await ran.step()
    await services._snapshots.take(ran.run)
    first = ran.directories
    await ran.step()
    await services._snapshots.take(ran.run)
    assert ran.snapshot.seq == 2
    assert ran.directories == [ran.snapshot.directory] != first


async def test_an_older_state_never_replaces_a_newer(services: Services, ran: Ran) -> None:
    await ran.step()
    await services._snapshots.take(ran.run)
    older = await ran.state()
    await ran.step()
    await services._snapshots.take(ran.run)
    newer = ran.snapshot
    await services._snapshots.write(ran.run, 1, older)
    assert ran.snapshot == newer
    assert ran.directories == [newer.directory]


async def test_a_run_is_due_once_it_has_changed_for_the_interval_and_the_longest_first(
    services: Services, alice: Tenant, session: Session, settled: Settled, ran: Ran
) -> None:
    other = await begin(services, alice, session, settled, 1)
    snapshots = services._snapshots
    for one in (other, ran, other):
        await one.step()
    assert snapshots.due() is None
    snapshots._interval_s = 0.0
    assert snapshots.due() == other.run.run_id
    await snapshots.take(other.run)
    assert snapshots.is_current(other.run.run_id)
    assert snapshots.due() == ran.run.run_id
    await ran.backward()
    assert not snapshots.is_current(ran.run.run_id)
    assert snapshots.due() == ran.run.run_id


async def test_after_a_snapshot_none_begins_for_nine_times_as_long(
    services: Services, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = 1000.0
    snapshots = services._snapshots
    snapshots._interval_s = 5.0
    monkeypatch.setattr("tuft.service.snapshots.time.monotonic", lambda: clock_s)
    snapshots.changed(ran.run.run_id)
    clock_s += 6.0
    assert snapshots.due() == ran.run.run_id
    snapshots.pause_after(clock_s - 1.0)
    for passed_s, due in ((8.9, None), (0.2, ran.run.run_id)):
        clock_s += passed_s
        assert snapshots.due() == due
    monkeypatch.undo()
    snapshots.unchanged(ran.run.run_id)


async def test_what_is_due_is_written_down_in_the_background(services: Services, ran: Ran) -> None:
    await ran.step()
    services._snapshots._interval_s = 0.0
    while services._journal.snapshot(ran.run.run_id) is None:
        await asyncio.sleep(0.05)
    assert ran.snapshot.seq == 1


async def test_a_load_is_a_snapshot_at_once_so_that_the_checkpoint_may_go(services: Services, ran: Ran) -> None:
    await ran.backward()
    await ran.step()
    path = await ran.save()
    assert ran.directories == []
    await ran.step()
    await ran.load(path)
    assert ran.snapshot.seq == ran.seq
    loaded = await ran.state()
    services.checkpoints.delete(ran.tenant, path)
    services.residency._generations.clear()  # as after the death of the engine
    await ran.step()
    await services._snapshots.take(ran.run)
    assert (loaded.step, (await ran.state()).step) == (1, 2)


async def test_nothing_is_written_while_a_load_may_or_may_not_have_happened(
    services: Services, ran: Ran, settled: Settled
) -> None:
    await ran.step()
    path = await ran.save()
    loading = await services.operations.load_weights(ran.tenant, ran.run.run_id, 3, path, True, None)
    assert not await services._snapshots.take(ran.run)
    await settled(loading)
    assert ran.snapshot.seq == 3


async def test_a_disk_that_does_not_take_it_leaves_the_older_one(services: Services, ran: Ran) -> None:
    await ran.step()
    await services._snapshots.take(ran.run)
    known, directory = ran.snapshot, services.config.home / "snapshots" / ran.run.run_id
    await ran.step()
    away = directory.rename(directory.with_name("away"))
    directory.write_text("no directory")
    with pytest.raises(StorageError, match="could not be written"):
        await services._snapshots.take(ran.run)
    assert not services._snapshots.is_current(ran.run.run_id), "it is tried again"
    directory.unlink()
    away.rename(directory)
    assert ran.snapshot == known
    assert ran.directories == [known.directory]
    assert await services._snapshots.take(ran.run)
    assert ran.snapshot.seq == 2


async def test_a_database_that_does_not_take_it_leaves_no_files(services: Services, ran: Ran) -> None:
    await ran.step()
    await services._snapshots.take(ran.run)
    stranger = replace(ran.run, run_id="nobody")
    with pytest.raises(StorageError):
        await services._snapshots.write(stranger, 1, await ran.state())
    assert directories(services) == [ran.snapshot.directory]


async def test_a_run_that_ends_leaves_nothing(services: Services, ran: Ran) -> None:
    await ran.step()
    await services._snapshots.take(ran.run)
    await ran.settled(await services.runs.unload(ran.tenant, ran.run.run_id))
    assert services._journal.snapshot(ran.run.run_id) is None
    assert directories(services) == []
    assert services._snapshots.is_current(ran.run.run_id)


async def test_what_an_earlier_server_left_half_written_or_without_a_row_goes(
    services: Services, ran: Ran, tmp_path: Path
) -> None:
    await ran.step()
    await services._snapshots.take(ran.run)
    kept = ran.directories
    root = services.config.home / "snapshots"
    (root / ran.run.run_id / ".partial-1-x").mkdir()
    (root / ran.run.run_id / "1-unnamed").mkdir()
    (root / "an-ended-run" / "7-x").mkdir(parents=True)
    services._snapshots.start()
    assert directories(services) == kept
