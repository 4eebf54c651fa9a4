"""What checkpoints hold, on its way into runs."""

from __future__ import annotations

from dataclasses import replace

from tuft.engine.base import LoadAdapter
from tuft.errors import InvalidInput, StorageError
from tuft.records import Checkpoint, Run, Tenant
from tuft.service.calls import CreateRunFromCheckpoint, LoadWeights
from tuft.service.checkpoints import Checkpoints, require_same
from tuft.service.queue import Operation
from tuft.service.residency import Residency
from tuft.service.runs import Runs
from tuft.service.scheduler import Scheduler
from tuft.service.snapshots import Snapshots
from tuft.types import AdapterState, FutureResult, WeightsLoaded


class Loading:
    """Does what the calls ask for when their turn has come."""

    def __init__(
        self, scheduler: Scheduler, runs: Runs, checkpoints: Checkpoints, snapshots: Snapshots, residency: Residency
    ) -> None:
        self._runs = runs
        self._residency = residency
        self._checkpoints = checkpoints
        self._snapshots = snapshots
        scheduler.perform(CreateRunFromCheckpoint, self._create_from_checkpoint)
        scheduler.perform(LoadWeights, self._load_weights)

    async def _create_from_checkpoint(self, operation: Operation, call: CreateRunFromCheckpoint) -> FutureResult:
        run = self._runs.open_one(operation.run_id)
        with self._runs.closing_if_it_fails(run):
            present = self._checkpoints.loadable(call.readers, call.path)  # a name may change its meaning
            await self._load(
                run, operation.seq, await self._read_state(run, call.readers[0], present, call.with_optimizer)
            )
        return WeightsLoaded(call.path, run.run_id)

    async def _load_weights(self, operation: Operation, call: LoadWeights) -> FutureResult:
        """The run's gradients are gone, its moments too unless loaded."""
        run = self._runs.open_one(operation.run_id)
        checkpoint = self._checkpoints.loadable(call.readers, call.path)
        for name in ("rank", "train_attn", "train_mlp", "train_unembed"):
            ours, theirs = getattr(run.spec, name), getattr(checkpoint.spec, name)
            if ours != theirs:
                allowed = f"its {name} is {theirs}, the run's is {ours}; they must be equal"
                raise InvalidInput("path", call.path, allowed)
        if checkpoint.base_model != run.base_model:
            allowed = f"it belongs to {checkpoint.base_model}, the run to {run.base_model}"
            raise InvalidInput("path", call.path, allowed)
        await self._load(
            run, operation.seq, await self._read_state(run, call.readers[0], checkpoint, call.with_optimizer)
        )
        return WeightsLoaded(call.path, run.run_id)

    async def _load(self, run: Run, seq: int, state: AdapterState) -> None:
        """Go on from ``state``. It becomes the run's snapshot: the checkpoint may be gone when the run comes back."""
        await self._runs.place(run, LoadAdapter(run.run_id, run.base_model, state, trainable=True))
        try:
            await self._snapshots.write(run, seq, state)
        except StorageError:  # then nothing has been loaded
            self._residency.discard(run.run_id)
            raise

    async def _read_state(self, run: Run, reader: Tenant, checkpoint: Checkpoint, with_optimizer: bool) -> AdapterState:
        """What ``run`` is to begin with, or to go on with."""
        if with_optimizer and not checkpoint.has_optimizer:
            allowed = "it holds no optimizer state; save_state() makes checkpoints that do"
            raise InvalidInput("path", str(checkpoint.path), allowed)
        if with_optimizer:
            require_same(checkpoint, run.optimizer)
        self._checkpoints.note_read(reader, checkpoint, "training")
        state = await self._checkpoints.read(checkpoint.directory, with_optimizer=with_optimizer)
        return replace(state, spec=run.spec, optimizer=run.optimizer)
