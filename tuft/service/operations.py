"""The calls of a run's loop: checked, then queued in the order of their seq. Each returns its future's id at once.

A call that cannot be honoured fails through its future, so that its seq is consumed: the client counts on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuft.engine.base import CopyAdapter, ExportAdapter, OptimStep, RunLoss
from tuft.errors import InvalidInput, TuftError
from tuft.losses import check_loss
from tuft.optimizers import check_step
from tuft.records import CheckpointPath, Run, Tenant, valid_name
from tuft.service.checkpoints import Checkpoints
from tuft.service.custom_losses import CustomLosses
from tuft.service.models import BaseModels
from tuft.service.provenance import Provenance
from tuft.service.queue import Barrier, Work
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.scheduler import Scheduler, lost
from tuft.service.validation import check_recipients, check_sampler_kind, check_seq, check_ttl
from tuft.types import (
    AdapterState,
    Datum,
    ExternalSaved,
    FutureResult,
    Optimizer,
    OptimizerParams,
    SamplerSaved,
    WeightsSaved,
)


class Operations:
    """All methods take the calling tenant and raise NotFound for a run that is not theirs."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: BaseModels,
        runs: Runs,
        checkpoints: Checkpoints,
        samplers: Samplers,
        provenance: Provenance,
        custom_losses: CustomLosses,
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._runs = runs
        self._checkpoints = checkpoints
        self._samplers = samplers
        self._provenance = provenance
        self._custom_losses = custom_losses

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
            custom = self._custom_losses.named_by(run, loss_fn_config) if loss_fn == "custom" else None
            check_loss(data, loss_fn, loss_fn_config, self._models.require(run.base_model), custom=custom)
            known = self._provenance.resolve(run, data) if loss_fn == "stable_reinforce" else data
            return RunLoss(run_id, known, loss_fn, tuple(loss_fn_config.items()), backward, custom_loss=custom)

        return self._submit(tenant, run_id, seq_id, "forward_backward" if backward else "forward", prepare)

    def optim_step(self, tenant: Tenant, run_id: str, seq_id: int, params: OptimizerParams) -> str:
        """One update from the accumulated gradients, by the run's optimizer. Future: OptimStepResult."""

        def prepare(run: Run) -> OptimStep:
            check_step(params, run.optimizer)
            return OptimStep(run_id, params)

        return self._submit(tenant, run_id, seq_id, "optim_step", prepare)

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
                    self._checkpoints.require_free(path)
                state: AdapterState = await self._ask(run, ExportAdapter(run_id, with_optimizer=True))
                await self._checkpoints.save(tenant, run, path, state, ttl_seconds, user_metadata)
                return WeightsSaved(str(path))

            return save

        return self._submit(tenant, run_id, seq_id, "save_weights", prepare)

    def save_weights_for_sampler(
        self,
        tenant: Tenant,
        run_id: str,
        seq_id: int,
        name: str | None,
        sampling_session_seq_id: int | None,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, str],
        kind: str = "snapshot",
    ) -> str:
        """Give the present weights to samplers: under ``name``, or, without one, in a sampling session of their own
        that nothing else can name. There, those of ``kind`` "snapshot" are frozen; "inflight" ones replace the weights
        of all inflight sessions of the run. Future: SamplerSaved."""

        def prepare(run: Run) -> Barrier:
            check_sampler_kind(kind, name, ttl_seconds)
            if name is not None:
                valid_name(name, "path")
            elif sampling_session_seq_id is None:
                raise InvalidInput("sampling_session_seq_id", None, "give it, or a path to name the weights")
            else:
                check_seq(sampling_session_seq_id, "sampling_session_seq_id")
            check_ttl(ttl_seconds)

            async def save() -> FutureResult:
                if name is None and sampling_session_seq_id is not None:
                    self._samplers.require_free(run.session_id, sampling_session_seq_id)
                state: AdapterState = await self._ask(run, ExportAdapter(run_id, with_optimizer=False))
                if name is not None:
                    path = CheckpointPath(run_id, "sampler", name)
                    saved = await self._checkpoints.save(tenant, run, path, state, ttl_seconds, user_metadata)
                    await self._copy(run, saved.directory)
                    return SamplerSaved(str(saved.path), None)
                directory, _ = await self._checkpoints.write(run, "ephemeral", state)
                await self._copy(run, directory)
                assert sampling_session_seq_id is not None
                if kind == "inflight":
                    sampler = await self._samplers.add_inflight(run, sampling_session_seq_id, directory)
                else:
                    sampler = self._samplers.add_ephemeral(run, sampling_session_seq_id, directory)
                return SamplerSaved(None, sampler.sampler_id)

            return save

        return self._submit(tenant, run_id, seq_id, "save_weights_for_sampler", prepare)

    def save_weights_external(
        self,
        tenant: Tenant,
        run_id: str,
        seq_id: int,
        name: str,
        ttl_seconds: int | None,
        recipients: Sequence[str] | None,
    ) -> str:
        """PEFT's files of the present weights, to be downloaded; encrypted with age if there are ``recipients``.
        Future: ExternalSaved."""

        def prepare(run: Run) -> Barrier:
            path = CheckpointPath(run_id, "external", valid_name(name, "path"))
            check_ttl(ttl_seconds)
            check_recipients(recipients)

            async def save() -> FutureResult:
                state: AdapterState = await self._ask(run, ExportAdapter(run_id, with_optimizer=False))
                saved = await self._checkpoints.save(tenant, run, path, state, ttl_seconds, {}, recipients)
                return ExternalSaved(str(path), saved.size_bytes)

            return save

        return self._submit(tenant, run_id, seq_id, "save_weights_external", prepare)

    def load_weights(
        self,
        tenant: Tenant,
        run_id: str,
        seq_id: int,
        path: str,
        with_optimizer: bool,
        access_token: str | None,
        optimizer: Optimizer | None = None,
    ) -> str:
        """Replace the run's weights by a checkpoint's; ``optimizer``, if given, can but be the run's own. Future:
        WeightsLoaded."""

        def prepare(run: Run) -> Barrier:
            if optimizer not in (None, run.optimizer):
                allowed = f"the run's optimizer is {run.optimizer!r} for as long as it lives"
                raise InvalidInput("optimizer_config.type", optimizer, allowed)

            async def load() -> FutureResult:
                present = self._runs.get(tenant, run_id)
                return await self._runs.load(tenant, present, path, with_optimizer, access_token)

            return load

        return self._submit(tenant, run_id, seq_id, "load_weights", prepare)

    def reject(self, tenant: Tenant, run_id: str, seq_id: int, error: TuftError) -> str:
        """Consume the seq with a future that fails with ``error``."""

        def prepare(_run: Run) -> Barrier:
            raise error

        return self._submit(tenant, run_id, seq_id, "rejected", prepare)

    def _submit(self, tenant: Tenant, run_id: str, seq_id: int, name: str, prepare: Callable[[Run], Work]) -> str:
        run = self._runs.get(tenant, run_id)
        if seq_id < 1:
            raise InvalidInput("seq_id", seq_id, "must be at least 1")
        self._runs.touch(run)
        work: Work
        try:
            work = prepare(run)
        except TuftError as error:
            work = _failing(error)
        return self._scheduler.submit(run, seq_id, name, work)

    async def _ask(self, run: Run, command: ExportAdapter | CopyAdapter) -> Any:
        if not self._scheduler.is_live(run.run_id):
            raise lost(run.run_id)
        return await self._scheduler.ask(command)

    async def _copy(self, run: Run, directory: str) -> None:
        await self._ask(run, CopyAdapter(run.run_id, directory))
        self._samplers.residents.note(directory)


def _failing(error: TuftError) -> Barrier:
    async def fail() -> FutureResult:
        raise error

    return fail
