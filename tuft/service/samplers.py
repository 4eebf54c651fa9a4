"""Sampling sessions, and which frozen adapters the engine holds for them.

In the engine a frozen adapter goes by the directory its weights are saved in: what a directory holds never changes, so
neither does what a sampler made from it says.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from tuft.config import LimitsSection
from tuft.engine.base import DropAdapter, Engine, LoadAdapter, Sample
from tuft.errors import InvalidInput, NotFound
from tuft.records import Run, SamplerInfo, Tenant, now
from tuft.service.checkpoints import Checkpoints
from tuft.service.models import BaseModels
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.validation import check_sampling, check_seq
from tuft.store.catalog import Catalog
from tuft.types import FutureResult, SamplingParams


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
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._scheduler = scheduler
        self._models = models
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._limits = limits
        self._resident: OrderedDict[str, int] = OrderedDict()  # directory -> engine generation; least used first
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._future_of_seq: dict[tuple[str, int], str] = {}

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
            checkpoint = self._checkpoints.get(tenant, model_path)
            model = self._models.require(checkpoint.base_model)
            if base_model is not None and self._models.require(base_model).name != model.name:
                raise InvalidInput("base_model", base_model, f"{model_path} belongs to {model.name}")
            directory = checkpoint.directory
        elif base_model is not None:
            model = self._models.require(base_model)
        else:
            raise InvalidInput("base_model", None, "give base_model or model_path")
        return self._add(
            tenant.tenant_id, session.session_id, sampling_session_seq_id, model.name, model_path, directory
        )

    def add_ephemeral(self, run: Run, sampling_session_seq_id: int, directory: str) -> SamplerInfo:
        """A sampling session on weights that no path names."""
        return self._add(run.tenant_id, run.session_id, sampling_session_seq_id, run.base_model, None, directory)

    def get(self, tenant: Tenant, sampler_id: str) -> SamplerInfo:
        """The tenant's sampler of that id; raises NotFound."""
        sampler = self._catalog.sampler(tenant, sampler_id)
        if sampler is None:
            raise NotFound(f"sampling_session_id: {sampler_id!r} is unknown")
        return sampler

    def sample(
        self,
        tenant: Tenant,
        sampling_session_id: str,
        seq_id: int,
        prompt_tokens: tuple[int, ...],
        params: SamplingParams,
        num_samples: int,
        prompt_logprobs: bool,
        topk_prompt_logprobs: int,
    ) -> tuple[str, list[str]]:
        """Start sampling; returns the future of its SampleResult and an id for each sequence to come.

        A retry of (sampling session, seq_id) gets the first call's. Raises InvalidInput or NotFound at once.
        """
        sampler = self.get(tenant, sampling_session_id)
        model = self._models.require(sampler.base_model)
        check_sampling(prompt_tokens, params, num_samples, topk_prompt_logprobs, model, self._limits)
        sequence_ids = [f"{sampling_session_id}:{seq_id}:{index}" for index in range(num_samples)]
        key = (sampling_session_id, seq_id)
        known = self._future_of_seq.get(key)
        if known is not None and self._scheduler.knows(known):
            return known, sequence_ids
        command = Sample(
            base_model=sampler.base_model,
            adapter_id=sampler.directory,
            prompt_tokens=prompt_tokens,
            params=params,
            num_samples=num_samples,
            prompt_logprobs=prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            cache_scope=tenant.tenant_id,
        )

        async def run() -> FutureResult:
            if sampler.directory is not None:
                await self._ensure_resident(sampler.directory, sampler.base_model)
            result: FutureResult = await self._scheduler.ask(command)
            return result

        future_id = self._scheduler.start(tenant.tenant_id, run)
        self._future_of_seq[key] = future_id
        return future_id, sequence_ids

    def note_resident(self, directory: str) -> None:
        """The engine holds the adapter of ``directory`` now; beyond the limit, the least used one leaves."""
        self._resident[directory] = self._engine.generation
        self._resident.move_to_end(directory)
        while len(self._resident) > self._limits.max_resident_samplers:
            leaving, _ = self._resident.popitem(last=False)
            self._engine.submit([DropAdapter(leaving)])

    def sweep(self) -> None:
        """Forget the retries of futures that are no longer kept, and the ephemeral weights of sessions that are over:
        nothing can name them any more."""
        for session_id in filter(self._sessions.is_over, self._catalog.ephemeral_sessions()):
            for directory in self._catalog.delete_ephemeral_samplers(session_id):
                self._checkpoints.discard(directory)
                if self._resident.pop(directory, None) is not None:
                    self._engine.submit([DropAdapter(directory)])
        self._future_of_seq = {
            key: future_id for key, future_id in self._future_of_seq.items() if self._scheduler.knows(future_id)
        }

    async def _ensure_resident(self, directory: str, base_model: str) -> None:
        if self._resident.get(directory) == self._engine.generation:
            self._resident.move_to_end(directory)
            return
        if directory not in self._loading:  # whoever comes while it loads waits for the same load
            task = asyncio.get_running_loop().create_task(self._load(directory, base_model))
            task.add_done_callback(lambda _: self._loading.pop(directory))
            self._loading[directory] = task
        await asyncio.shield(self._loading[directory])

    async def _load(self, directory: str, base_model: str) -> None:
        state = await self._checkpoints.read(directory, with_optimizer=False)
        await self._scheduler.ask(LoadAdapter(directory, base_model, state, trainable=False))
        self.note_resident(directory)

    def _add(
        self,
        tenant_id: str,
        session_id: str,
        sampling_session_seq_id: int,
        base_model: str,
        model_path: str | None,
        directory: str | None,
    ) -> SamplerInfo:
        if self._catalog.has_sampler(_sampler_id(session_id, sampling_session_seq_id)):
            raise InvalidInput("sampling_session_seq_id", sampling_session_seq_id, "is taken in this session")
        sampler = SamplerInfo(
            sampler_id=_sampler_id(session_id, sampling_session_seq_id),
            tenant_id=tenant_id,
            session_id=session_id,
            sampling_session_seq_id=sampling_session_seq_id,
            base_model=base_model,
            model_path=model_path,
            directory=directory,
            created_at=now(),
        )
        self._catalog.add_sampler(sampler)
        return sampler


def _sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"
