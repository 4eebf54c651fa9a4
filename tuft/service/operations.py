"""The calls of a run's loop: checked, journaled, queued in the order of their seq, and those done that are no
computation. Each call returns its future's id once it is journaled.

A call that cannot be honoured fails through its future, so that its seq is consumed: the client counts on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuft.engine.base import CopyAdapter, ExportAdapter, OptimStep, RunLoss
from tuft.errors import InvalidInput, ServerError, TuftError, UserError
from tuft.footprint import adapter_parameters, check_sequences
from tuft.losses import check_loss
from tuft.optimizers import check_step
from tuft.records import Checkpoint, CheckpointPath, Run, Tenant, valid_name
from tuft.service.calls import LoadWeights, Rejected, SaveExternal, SaveForSampler, SaveWeights
from tuft.service.checkpoints import Checkpoints
from tuft.service.custom_losses import CustomLosses
from tuft.service.models import BaseModels
from tuft.service.provenance import Provenance
from tuft.service.queue import Operation
from tuft.service.runs import Runs
from tuft.service.samplers import Samplers
from tuft.service.scheduler import Scheduler
from tuft.service.settlements import failure
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
    """All calls take the calling tenant and raise NotFound for a run that is not theirs, and what
    ``Futures.accept`` raises."""

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
        scheduler.perform(Rejected, self._fail)
        scheduler.perform(SaveWeights, self._save)
        scheduler.perform(SaveForSampler, self._save_for_sampler)
        scheduler.perform(SaveExternal, self._save_external)

    async def forward_backward(
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
        run = self._run(tenant, run_id, seq_id)
        sent = RunLoss(run_id, data, loss_fn, tuple(sorted(loss_fn_config.items())), backward)

        def check() -> RunLoss:
            custom = self._custom_losses.named_by(run, loss_fn_config) if loss_fn == "custom" else None
            model = self._models.require(run.base_model)
            check_loss(data, loss_fn, loss_fn_config, model, custom=custom)
            check_sequences(data, adapter_parameters(model.linear_shapes, run.spec), model.memory)
            if custom is None and loss_fn != "stable_reinforce":
                return sent
            known = self._provenance.resolve(run, data) if loss_fn == "stable_reinforce" else data
            return replace(sent, data=known, custom_loss=custom)

        name = "forward_backward" if backward else "forward"
        return await self._scheduler.submit(tenant, run, seq_id, name, sent, check)

    async def optim_step(self, tenant: Tenant, run_id: str, seq_id: int, params: OptimizerParams) -> str:
        """One update from the accumulated gradients, by the run's optimizer. Future: OptimStepResult."""
        run = self._run(tenant, run_id, seq_id)
        sent = OptimStep(run_id, params)

        def check() -> OptimStep:
            check_step(params, run.optimizer)
            return sent

        return await self._scheduler.submit(tenant, run, seq_id, "optim_step", sent, check)

    async def save_weights(
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
        run = self._run(tenant, run_id, seq_id)
        sent = SaveWeights(name or "", ttl_seconds, overwrite, user_metadata)

        def check() -> SaveWeights:
            if name is None:
                raise InvalidInput("path", None, "save_state needs a name")
            valid_name(name, "path")
            check_ttl(ttl_seconds)
            return sent

        return await self._scheduler.submit(tenant, run, seq_id, "save_weights", sent, check)

    async def save_weights_for_sampler(
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
        run = self._run(tenant, run_id, seq_id)
        sent = SaveForSampler(name, sampling_session_seq_id, ttl_seconds, user_metadata, kind)

        def check() -> SaveForSampler:
            check_sampler_kind(kind, name, ttl_seconds)
            if name is not None:
                valid_name(name, "path")
            elif sampling_session_seq_id is None:
                raise InvalidInput("sampling_session_seq_id", None, "give it, or a path to name the weights")
            else:
                check_seq(sampling_session_seq_id, "sampling_session_seq_id")
            check_ttl(ttl_seconds)
            return sent

        return await self._scheduler.submit(tenant, run, seq_id, "save_weights_for_sampler", sent, check)

    async def save_weights_external(
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
        run = self._run(tenant, run_id, seq_id)
        sent = SaveExternal(name, ttl_seconds, None if recipients is None else tuple(recipients))

        def check() -> SaveExternal:
            valid_name(name, "path")
            check_ttl(ttl_seconds)
            check_recipients(recipients)
            return sent

        return await self._scheduler.submit(tenant, run, seq_id, "save_weights_external", sent, check)

    async def load_weights(
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
        run = self._run(tenant, run_id, seq_id)
        sent = LoadWeights(path, with_optimizer, optimizer)

        def check() -> LoadWeights:
            if optimizer not in (None, run.optimizer):
                allowed = f"the run's optimizer is {run.optimizer!r} for as long as it lives"
                raise InvalidInput("optimizer_config.type", optimizer, allowed)
            return replace(sent, readers=self._checkpoints.readers(tenant, access_token))

        return await self._scheduler.submit(tenant, run, seq_id, "load_weights", sent, check)

    async def reject(self, tenant: Tenant, run_id: str, seq_id: int, error: TuftError) -> str:
        """Consume the seq with a future that fails with ``error``."""
        run = self._run(tenant, run_id, seq_id)
        refused = failure(error)
        sent = Rejected(refused.message, refused.category)
        return await self._scheduler.submit(tenant, run, seq_id, "rejected", sent)

    # --- when their turn has come -------------------------------------------------------------------------------------

    async def _fail(self, _operation: Operation, call: Rejected) -> FutureResult:
        error = UserError(call.message) if call.category == "user" else ServerError(call.message)
        error.refused = call.refused
        raise error

    async def _save(self, operation: Operation, call: SaveWeights) -> FutureResult:
        run = self._runs.open_one(operation.run_id)
        path = CheckpointPath(run.run_id, "training", call.name)
        if not self._checkpoints.is_saved_by(path, operation.seq):
            if not call.overwrite:
                self._checkpoints.require_free(path)
            state = await self._export(run, with_optimizer=True)
            await self._name(operation, run, path, state, call.ttl_seconds, call.user_metadata)
        return WeightsSaved(str(path))

    async def _save_for_sampler(self, operation: Operation, call: SaveForSampler) -> FutureResult:
        run = self._runs.open_one(operation.run_id)
        if call.name is not None:
            path = CheckpointPath(run.run_id, "sampler", call.name)
            if not self._checkpoints.is_saved_by(path, operation.seq):
                state = await self._export(run)
                saved = await self._name(operation, run, path, state, call.ttl_seconds, call.user_metadata)
                await self._copy(run, saved.directory)
            return SamplerSaved(str(path), None)
        assert call.sampling_session_seq_id is not None
        known = await self._samplers.saved_by(run, call.sampling_session_seq_id, operation.seq)
        if known is not None:
            return SamplerSaved(None, known.sampler_id)
        self._samplers.require_free(run.session_id, call.sampling_session_seq_id)
        directory, _ = await self._checkpoints.write(run, "ephemeral", await self._export(run))
        await self._copy(run, directory)
        sampler = await self._samplers.add_saved(
            run, call.sampling_session_seq_id, directory, operation.seq, is_inflight=call.kind == "inflight"
        )
        return SamplerSaved(None, sampler.sampler_id)

    async def _save_external(self, operation: Operation, call: SaveExternal) -> FutureResult:
        run = self._runs.open_one(operation.run_id)
        path = CheckpointPath(run.run_id, "external", call.name)
        if not self._checkpoints.is_saved_by(path, operation.seq):
            state = await self._export(run)
            await self._name(operation, run, path, state, call.ttl_seconds, {}, call.recipients)
        saved = self._checkpoints.at(path)
        return ExternalSaved(str(path), 0 if saved is None else saved.size_bytes)

    async def _name(
        self,
        operation: Operation,
        run: Run,
        path: CheckpointPath,
        state: AdapterState,
        ttl_seconds: int | None,
        user_metadata: Mapping[str, str],
        recipients: Sequence[str] | None = None,
    ) -> Checkpoint:
        """Save ``state`` under ``path``, for the caller of ``operation``."""
        owner = replace(self._runs.owner(run), key_number=operation.key_number)
        return await self._checkpoints.save(
            owner, run, path, state, ttl_seconds, user_metadata, recipients, saved_seq=operation.seq
        )

    def _run(self, tenant: Tenant, run_id: str, seq_id: int) -> Run:
        run = self._runs.get(tenant, run_id)
        if seq_id < 1:
            raise InvalidInput("seq_id", seq_id, "must be at least 1")
        self._runs.touch(run)
        return run

    async def _export(self, run: Run, *, with_optimizer: bool = False) -> AdapterState:
        state: AdapterState = await self._scheduler.replies.ask(ExportAdapter(run.run_id, with_optimizer))
        return state

    async def _copy(self, run: Run, directory: str) -> None:
        await self._scheduler.replies.ask(CopyAdapter(run.run_id, directory))
        self._samplers.residents.note(directory)
