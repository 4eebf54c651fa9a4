"""The calls of a run's loop: checked, then queued in the order of their seq. Each returns its future's id at once.

A call that cannot be honoured fails through its future, so that its seq is consumed: the client counts on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tuft.engine.base import CopyAdapter, ExportAdapter, OptimStep, RunLoss
from tuft.errors import InvalidInput, TuftError
from tuft.records import CheckpointPath, Run, Tenant, valid_name
from tuft.service.checkpoints import Checkpoints
from tuft.service.models import BaseModels
from tuft.service.queue import Barrier, Work
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.scheduler import Scheduler, lost
from tuft.service.validation import check_adam, check_loss, check_seq, check_ttl
from tuft.types import AdamParams, AdapterState, Datum, FutureResult, SamplerSaved, WeightsSaved


class Operations:
    """All methods take the calling tenant and raise NotFound for a run that is not theirs."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: BaseModels,
        runs: Runs,
        checkpoints: Checkpoints,
        samplers: Samplers,
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._runs = runs
        self._checkpoints = checkpoints
        self._samplers = samplers

    def forward_backward(
        self,
        tenant: Tenant,
        run_id: str,
        seq_id: int,
        data: tuple[Datum, ...],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str],
        backward: bool,
    ) -> str:
        """The loss of ``data`` and, if ``backward``, its gradients, which accumulate. Future: LossResult."""

        def prepare(run: Run) -> RunLoss:
            if run.status == "live" and not self._scheduler.is_live(run_id):
                raise lost(run_id)
            check_loss(data, loss_fn, loss_fn_config, self._models.require(run.base_model))
            return RunLoss(run_id, data, loss_fn, tuple(loss_fn_config.items()), backward)

        return self._submit(tenant, run_id, seq_id, prepare)

    def optim_step(self, tenant: Tenant, run_id: str, seq_id: int, params: AdamParams) -> str:
        """One AdamW update from the accumulated gradients. Future: OptimStepResult."""

        def prepare(_run: Run) -> OptimStep:
            check_adam(params)
            return OptimStep(run_id, params)

        return self._submit(tenant, run_id, seq_id, prepare)

    def save_weights(
        self,
        tenant: Tenant,
        run_id: str,
        seq_id: int,
        name: str | None,
        ttl_seconds: int | None,
        overwrite: bool,
        user_metadata: Mapping[str, str],
    ) -> str:
        """A training checkpoint: weights, moments, step and accumulated gradients. Future: WeightsSaved."""

        def prepare(run: Run) -> Barrier:
            if name is None:
                raise InvalidInput("path", None, "save_state needs a name")
            path = CheckpointPath(run_id, "training", valid_name(name, "path"))
            check_ttl(ttl_seconds)

            async def save() -> FutureResult:
                if not overwrite:
                    self._checkpoints.require_free(tenant, path)
                state: AdapterState = await self._ask(run, ExportAdapter(run_id, with_optimizer=True))
                await self._checkpoints.save(run, "training", name, state, ttl_seconds, user_metadata)
                return WeightsSaved(str(path))

            return save

        return self._submit(tenant, run_id, seq_id, prepare)

    def save_weights_for_sampler(
        self,
        tenant: Tenant,
        run_id: str,
        seq_id: int,
        name: str | None,
        sampling_session_seq_id: int | None,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, str],
    ) -> str:
        """Freeze the present weights for sampling: under ``name``, or, without one, in a sampling session of their own
        that nothing else can name. Future: SamplerSaved."""

        def prepare(run: Run) -> Barrier:
            if name is not None:
                valid_name(name, "path")
            elif sampling_session_seq_id is None:
                raise InvalidInput("sampling_session_seq_id", None, "give it, or a path to name the weights")
            else:
                check_seq(sampling_session_seq_id, "sampling_session_seq_id")
            check_ttl(ttl_seconds)

            async def save() -> FutureResult:
                state: AdapterState = await self._ask(run, ExportAdapter(run_id, with_optimizer=False))
                if name is not None:
                    saved = await self._checkpoints.save(run, "sampler", name, state, ttl_seconds, user_metadata)
                    await self._copy(run, saved.directory)
                    return SamplerSaved(str(saved.path), None)
                directory, _ = await self._checkpoints.write(run, "ephemeral", state)
                await self._copy(run, directory)
                assert sampling_session_seq_id is not None
                sampler = self._samplers.add_ephemeral(run, sampling_session_seq_id, directory)
                return SamplerSaved(None, sampler.sampler_id)

            return save

        return self._submit(tenant, run_id, seq_id, prepare)

    def load_weights(self, tenant: Tenant, run_id: str, seq_id: int, path: str, with_optimizer: bool) -> str:
        """Replace the run's weights by a checkpoint's. Future: WeightsLoaded."""

        def prepare(_run: Run) -> Barrier:
            async def load() -> FutureResult:
                return await self._runs.load(tenant, self._runs.get(tenant, run_id), path, with_optimizer)

            return load

        return self._submit(tenant, run_id, seq_id, prepare)

    def reject(self, tenant: Tenant, run_id: str, seq_id: int, error: TuftError) -> str:
        """Consume the seq with a future that fails with ``error``."""

        def prepare(_run: Run) -> Barrier:
            raise error

        return self._submit(tenant, run_id, seq_id, prepare)

    def _submit(self, tenant: Tenant, run_id: str, seq_id: int, prepare: Callable[[Run], Work]) -> str:
        run = self._runs.get(tenant, run_id)
        if seq_id < 1:
            raise InvalidInput("seq_id", seq_id, "must be at least 1")
        self._runs.touch(run)
        work: Work
        try:
            work = prepare(run)
        except TuftError as error:
            work = _failing(error)
        return self._scheduler.submit(run, seq_id, work)

    async def _ask(self, run: Run, command: ExportAdapter | CopyAdapter) -> Any:
        if not self._scheduler.is_live(run.run_id):
            raise lost(run.run_id)
        return await self._scheduler.ask(command)

    async def _copy(self, run: Run, directory: str) -> None:
        await self._ask(run, CopyAdapter(run.run_id, directory))
        self._samplers.note_resident(directory)


def _failing(error: TuftError) -> Barrier:
    async def fail() -> FutureResult:
        raise error

    return fail
