"""Sampling sessions, and what is sampled in them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from tuft.config import LimitsSection
from tuft.engine.base import CancelSample, Engine, Sample
from tuft.errors import InvalidInput, NotFound, StorageError, TuftError, refusing
from tuft.records import FutureKey, JournaledFuture, Run, SamplerInfo, SamplingClient, Tenant, now
from tuft.service.activity import Activity
from tuft.service.admission import Admission
from tuft.service.calls import SampleCall
from tuft.service.checkpoints import Checkpoints
from tuft.service.completions import Completions
from tuft.service.errands import Errand
from tuft.service.futures import Futures
from tuft.service.models import BaseModels
from tuft.service.provenance import Provenance
from tuft.service.residents import Residents
from tuft.service.sampling_checks import check_sampling
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.validation import check_seq
from tuft.store.catalog import Catalog
from tuft.types import FutureResult, SampleResult, SampleSpec


class Samplers:
    """Samplers of all tenants."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        scheduler: Scheduler,
        models: BaseModels,
        sessions: Sessions,
        checkpoints: Checkpoints,
        limits: LimitsSection,
        provenance: Provenance,
        completions: Completions,
        activity: Activity,
        futures: Futures,
        admission: Admission,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._scheduler = scheduler
        self._models = models
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._limits = limits
        self._provenance = provenance
        self._completions = completions
        self._activity = activity
        self._futures = futures
        self._admission = admission
        self.residents = Residents(engine, scheduler, checkpoints, limits.max_resident_samplers)

    def create(
        self,
        tenant: Tenant,
        session_id: str,
        sampling_session_seq_id: int,
        base_model: str | None,
        model_path: str | None,
    ) -> SamplerInfo:
        """A sampling session on a saved checkpoint, or on the base model itself.

        A retry of (session, sampling_session_seq_id) gets the first call's. Raises InvalidInput or NotFound.
        """
        session = self._sessions.require(tenant, session_id)
        check_seq(sampling_session_seq_id, "sampling_session_seq_id")
        known = self._catalog.sampler(tenant, _sampler_id(session_id, sampling_session_seq_id))
        if known is not None:
            return known
        directory = None
        if model_path is not None:
            checkpoint = self._checkpoints.loadable((tenant,), model_path)
            model = self._models.require(checkpoint.base_model)
            if base_model is not None and self._models.require(base_model).name != model.name:
                raise InvalidInput("base_model", base_model, f"{model_path} belongs to {model.name}")
            directory = checkpoint.directory
            self._checkpoints.note_read(tenant, checkpoint, "sampling")
        elif base_model is not None:
            model = self._models.require(base_model)
        else:
            raise InvalidInput("base_model", None, "give base_model or model_path")
        return self._add(
            tenant.tenant_id, session.session_id, sampling_session_seq_id, model.name, model_path, directory
        )

    def require_free(self, session_id: str, sampling_session_seq_id: int) -> None:
        """Raises InvalidInput if the session has a sampler of that number."""
        if self._catalog.has_sampler(_sampler_id(session_id, sampling_session_seq_id)):
            raise InvalidInput("sampling_session_seq_id", sampling_session_seq_id, "is taken in this session")

    async def saved_by(self, run: Run, sampling_session_seq_id: int, seq: int) -> SamplerInfo | None:
        """The sampling session that operation ``seq`` of the run has made already: an earlier server died before it
        could say so, or had published the weights."""
        owner = Tenant(run.tenant_id, "")
        known = self._catalog.sampler(owner, _sampler_id(run.session_id, sampling_session_seq_id))
        if known is None or known.saved_seq != seq:
            return None
        await self._publish(known)
        return known

    async def add_saved(
        self, run: Run, sampling_session_seq_id: int, directory: str, saved_seq: int, *, is_inflight: bool
    ) -> SamplerInfo:
        """A sampling session on weights that no path names. Inflight ones are the run's mutable weights: those of
        ``directory`` from now on, in this and in all such sessions of the run. A request that has begun keeps what it
        began with."""
        sampler = self._add(
            run.tenant_id,
            run.session_id,
            sampling_session_seq_id,
            run.base_model,
            None,
            directory,
            inflight_run_id=run.run_id if is_inflight else None,
            saved_seq=saved_seq,
        )
        await self._publish(sampler)
        return sampler

    async def _publish(self, sampler: SamplerInfo) -> None:
        """If it is on mutable weights, have all such sessions of its run on its own."""
        if sampler.inflight_run_id is None or sampler.directory is None:
            return
        for replaced in self._catalog.move_inflight_samplers(sampler.inflight_run_id, sampler.directory):
            await self.residents.loaded(replaced)
            self.residents.discard(replaced)

    def join(self, tenant: Tenant, sampler_id: str) -> int:
        """Another client of a sampling session, in a process of its own; returns its number, which no other ever has.
        Raises NotFound."""
        number = self._catalog.count_join(tenant, sampler_id)
        if number is None:
            raise _unknown(sampler_id)
        return number

    def get(self, tenant: Tenant, sampler_id: str) -> SamplerInfo:
        """The tenant's sampler of that id; raises NotFound."""
        sampler = self._catalog.sampler(tenant, sampler_id)
        if sampler is None:
            raise _unknown(sampler_id)
        return sampler

    async def sample(
        self,
        tenant: Tenant,
        sampling_session_id: str,
        seq_id: int,
        spec: SampleSpec,
        record_stability_info: bool = False,
    ) -> tuple[str, list[str]]:
        """Start sampling; returns the future of its SampleResult and an id for each sequence to come.

        A retry of (sampling session, seq_id) gets the first call's. Raises InvalidInput, NotFound, or what
        ``Futures.accept`` raises.
        """
        sampler = self.get(tenant, sampling_session_id)
        model = self._models.require(sampler.base_model)
        check_sampling(spec, model, self._limits)
        key = FutureKey("sample", sampling_session_id, seq_id)
        call = SampleCall(spec, record_stability_info)
        future_id = await self._scheduler.errands.start(
            tenant,
            key,
            call,
            partial(self._sample, tenant, sampler, seq_id, call),
            charge=self._activity.sample_charge(sampler, spec),
            span=partial(self._activity.sample, sampler, seq_id, spec, tenant.key_number),
            can_cancel=True,
            on_start=partial(self._completions.expect, client=SamplingClient.of_seq(sampling_session_id, seq_id)),
            on_end=self._completions.note_end,
        )
        return future_id, _sequence_ids(sampling_session_id, seq_id, spec)

    async def resume(self, kept: Sequence[JournaledFuture]) -> int:
        """After a restart: do what an earlier server had accepted, and tell clients of what had ended. Returns how many
        are done again."""
        num_resumed = 0
        for known in kept:
            future_id, seq = known.future_id, known.key.seq
            self._completions.expect(future_id, SamplingClient.of_seq(known.key.subject_id, seq))
            if known.outcome is not None:
                self._completions.note_end(future_id)
                continue
            tenant = Tenant(known.tenant_id, "", key_number=known.key_number)
            work: Errand
            span = None
            sampler = self._catalog.sampler(tenant, known.key.subject_id)
            try:
                call: SampleCall = await self._futures.request(future_id)
            except StorageError as error:  # this one fails, the others go on
                work = partial(_failing, error)
            else:
                if sampler is None:
                    work = partial(_failing, _forgotten(known.key.subject_id))
                else:
                    work = partial(self._sample, tenant, sampler, seq, call)
                    span = partial(self._activity.sample, sampler, seq, call.spec, known.key_number)
            self._scheduler.errands.resume(
                future_id, work, span=span, can_cancel=True, on_end=self._completions.note_end
            )
            num_resumed += 1
        return num_resumed

    async def _sample(self, tenant: Tenant, sampler: SamplerInfo, seq: int, call: SampleCall) -> FutureResult:
        sample_id = f"{sampler.sampler_id}:{seq}"
        cache_scope = tenant.tenant_id if sampler.inflight_run_id is None else sampler.sampler_id
        room = max(1, self._models.require(sampler.base_model).max_context_tokens - len(call.spec.prompt_tokens))
        max_new = min(call.spec.params.max_tokens or room, room)
        async with self._admission.place(tenant, sample_id, sampler.base_model, call.spec, max_new) as end:
            directory = await self._resident_directory(tenant, sampler)
            weight = self._admission.line.weight(tenant.tenant_id)
            command = Sample(sampler.base_model, directory, call.spec, cache_scope, sample_id, tenant.tenant_id, weight)
            try:
                result: SampleResult = await self._scheduler.replies.ask(command)
            except asyncio.CancelledError:
                self._engine.submit([CancelSample(sample_id)])
                raise
            end(result)
        if call.record_stability_info:
            ids = _sequence_ids(sampler.sampler_id, seq, call.spec)
            self._provenance.record(tenant, sampler.session_id, ids, call.spec.prompt_tokens, result)
        return result

    async def sweep(self) -> None:
        """Forget the ephemeral weights of sessions that are over: nothing can name them any more."""
        for session_id in filter(self._sessions.is_over, await asyncio.to_thread(self._catalog.ephemeral_sessions)):
            for directory in self._catalog.delete_ephemeral_samplers(session_id):
                self.residents.discard(directory)

    async def _resident_directory(self, tenant: Tenant, sampler: SamplerInfo) -> str | None:
        """Where the sampler's weights are, which the engine holds at this moment; None: those of the base model."""
        while True:
            if sampler.inflight_run_id is not None:  # they may have been replaced meanwhile
                sampler = self.get(tenant, sampler.sampler_id)
            if sampler.directory is None or self.residents.use(sampler.directory):
                return sampler.directory
            await self.residents.load(sampler.directory, sampler.base_model)

    def _add(
        self,
        tenant_id: str,
        session_id: str,
        sampling_session_seq_id: int,
        base_model: str,
        model_path: str | None,
        directory: str | None,
        inflight_run_id: str | None = None,
        saved_seq: int | None = None,
    ) -> SamplerInfo:
        self.require_free(session_id, sampling_session_seq_id)
        sampler = SamplerInfo(
            sampler_id=_sampler_id(session_id, sampling_session_seq_id),
            tenant_id=tenant_id,
            session_id=session_id,
            sampling_session_seq_id=sampling_session_seq_id,
            base_model=base_model,
            model_path=model_path,
            directory=directory,
            created_at=now(),
            inflight_run_id=inflight_run_id,
            saved_seq=saved_seq,
        )
        self._catalog.add_sampler(sampler)
        return sampler


def _sequence_ids(sampler_id: str, seq: int, spec: SampleSpec) -> list[str]:
    return [f"{sampler_id}:{seq}:{index}" for index in range(spec.num_samples)]


async def _failing(error: TuftError) -> FutureResult:
    raise error


def _forgotten(sampler_id: str) -> NotFound:
    error = NotFound(f"sampling_session_id: {sampler_id!r} was forgotten with its session")
    return refusing("sampler", sampler_id, error)


def _sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"


def _unknown(sampler_id: str) -> NotFound:
    return refusing("sampler", sampler_id, NotFound(f"sampling_session_id: {sampler_id!r} is unknown"))
