"""Training runs: how they begin, who owns them, how they end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

from tuft.config import LimitsSection
from tuft.engine.base import Command, CreateAdapter, DropAdapter, Engine, LoadAdapter
from tuft.errors import InvalidInput, NotFound, QuotaExceeded, RunLost, TuftError
from tuft.records import Checkpoint, Run, RunStatus, Shared, Tenant, now
from tuft.service.checkpoints import Checkpoints
from tuft.service.models import BaseModels
from tuft.service.projects import Projects
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.validation import check_lora, check_seq
from tuft.store.catalog import Catalog
from tuft.types import AdapterState, FutureResult, LoraSpec, Optimizer, RunCreated, RunUnloaded, WeightsLoaded

_CREATION_SEQ = 0  # the SDK counts a run's operations from 1; its creation is the one before


class Runs:
    """Runs of all tenants; the live ones also in memory."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        scheduler: Scheduler,
        models: BaseModels,
        sessions: Sessions,
        checkpoints: Checkpoints,
        limits: LimitsSection,
        projects: Projects,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._scheduler = scheduler
        self._models = models
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._limits = limits
        self._projects = projects
        self._open: dict[str, Run] = {}
        self._touched: dict[str, datetime] = {}

    def create(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, str],
        optimizer: Optimizer = "adamw",
    ) -> str:
        """A new run with a fresh adapter; returns the future of its RunCreated.

        Raises InvalidInput, NotFound (session) or QuotaExceeded at once; a retry of (session, model_seq_id) gets the
        first call's future.
        """
        model = self._models.require(base_model)
        check_lora(spec, self._limits)
        run = self._register(tenant, session_id, model_seq_id, model.name, spec, user_metadata, optimizer)

        async def begin() -> FutureResult:
            with self._closing_if_it_fails(run):
                await self._place(run, CreateAdapter(run.run_id, run.base_model, run.spec, run.optimizer))
            return RunCreated(run.run_id)

        return self._scheduler.submit(run, _CREATION_SEQ, "create_model", begin)

    def create_from_checkpoint(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        path: str,
        with_optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, str],
        access_token: str | None,
        optimizer: Optimizer | None = None,
    ) -> str:
        """A new run that begins with a checkpoint's weights, and with its optimizer and that one's state if
        ``with_optimizer``; else with a fresh ``optimizer``, AdamW unless it is given, whatever the checkpoint's was."""
        checkpoint = self._checkpoints.loadable(tenant, path, access_token)
        model = self._models.require(checkpoint.base_model if base_model is None else base_model)
        if model.name != self._models.require(checkpoint.base_model).name:
            raise InvalidInput("base_model", base_model, f"the checkpoint belongs to {checkpoint.base_model}")
        check_lora(checkpoint.spec, self._limits)
        family = optimizer or (checkpoint.optimizer if with_optimizer else "adamw")
        if with_optimizer:
            _require_same(checkpoint, family)
        run = self._register(tenant, session_id, model_seq_id, model.name, checkpoint.spec, user_metadata, family)

        async def begin() -> FutureResult:
            with self._closing_if_it_fails(run):
                present = self._checkpoints.loadable(tenant, path, access_token)  # a name may change its meaning
                state = await self._read_state(tenant, run, present, with_optimizer)
                await self._place(run, LoadAdapter(run.run_id, run.base_model, state, trainable=True))
            return WeightsLoaded(path, run.run_id)

        return self._scheduler.submit(run, _CREATION_SEQ, "create_model_from_checkpoint", begin)

    async def load(
        self, tenant: Tenant, run: Run, path: str, with_optimizer: bool, access_token: str | None
    ) -> WeightsLoaded:
        """Replace a run's weights by a checkpoint's; its gradients are gone, its moments too unless loaded."""
        checkpoint = self._checkpoints.loadable(tenant, path, access_token)
        for name in ("rank", "train_attn", "train_mlp", "train_unembed"):
            ours, theirs = getattr(run.spec, name), getattr(checkpoint.spec, name)
            if ours != theirs:
                raise InvalidInput("path", path, f"its {name} is {theirs}, the run's is {ours}; they must be equal")
        if checkpoint.base_model != run.base_model:
            raise InvalidInput("path", path, f"it belongs to {checkpoint.base_model}, the run to {run.base_model}")
        state = await self._read_state(tenant, run, checkpoint, with_optimizer)
        await self._place(run, LoadAdapter(run.run_id, run.base_model, state, trainable=True))
        return WeightsLoaded(path, run.run_id)

    async def _read_state(self, tenant: Tenant, run: Run, checkpoint: Checkpoint, with_optimizer: bool) -> AdapterState:
        """What ``run`` is to begin with, or to go on with."""
        if with_optimizer and not checkpoint.has_optimizer:
            allowed = "it holds no optimizer state; save_state() makes checkpoints that do"
            raise InvalidInput("path", str(checkpoint.path), allowed)
        if with_optimizer:
            _require_same(checkpoint, run.optimizer)
        self._checkpoints.note_read(tenant, checkpoint, "training")
        state = await self._checkpoints.read(checkpoint.directory, with_optimizer=with_optimizer)
        return replace(state, spec=run.spec, optimizer=run.optimizer)

    def get(self, tenant: Tenant, run_id: str) -> Run:
        """The tenant's run of that id; raises NotFound."""
        run = self._open.get(run_id)
        if run is None or run.tenant_id != tenant.tenant_id:
            run = self._catalog.run(tenant, run_id)
        if run is None:
            raise _unknown(run_id)
        return self._as_touched(run)

    def find(self, tenant: Tenant, run_id: str, accessible: bool) -> Run:
        """The tenant's run of that id, or if ``accessible`` one of a project it shares; raises NotFound."""
        run = self._catalog.run_within_reach(tenant, self._shared(tenant, accessible), run_id)
        if run is None:
            raise _unknown(run_id)
        return self._as_touched(run)

    def list(
        self, tenant: Tenant, limit: int, offset: int, accessible: bool = False, project_id: str | None = None
    ) -> tuple[list[Run], int]:
        """One page of what ``find`` finds, newest first, and the number of all; of one project, if that is given."""
        runs, total = self._catalog.runs(tenant, limit, offset, self._shared(tenant, accessible), project_id)
        return [self._as_touched(run) for run in runs], total

    def owner_names(self, runs: Sequence[Run]) -> Mapping[str, str]:
        """Tenant id to name, of those who own ``runs``."""
        return self._catalog.tenant_names({run.tenant_id for run in runs})

    def touch(self, run: Run) -> None:
        """Note a request; written to the catalog now and then."""
        self._touched[run.run_id] = now()

    def unload(self, tenant: Tenant, run_id: str) -> str:
        """End a run: its adapter leaves the engine, its checkpoints stay. Returns the future of its RunUnloaded."""
        run = self.get(tenant, run_id)

        async def end() -> FutureResult:
            await self._scheduler.ask(DropAdapter(run_id))
            return RunUnloaded(run_id)

        self._close(run, "unloaded" if run.status in ("creating", "live") else run.status)
        return self._scheduler.start(tenant.tenant_id, end)

    def sweep(self) -> None:
        """Write what ``touch`` noted, note which runs the engine's end has taken, and unload those whose session is
        over: no client can reach them any more."""
        if self._touched:
            touched, self._touched = self._touched, {}
            self._catalog.touch_runs(touched)
        for run in list(self._open.values()):
            if run.status == "live" and not self._scheduler.is_live(run.run_id):
                self._set_status(run, "lost")
            if self._sessions.is_over(run.session_id):
                self._close(run, "unloaded" if run.status == "live" else run.status)
                self._engine.submit([DropAdapter(run.run_id)])

    def _as_touched(self, run: Run) -> Run:
        return replace(run, last_request_at=self._touched.get(run.run_id, run.last_request_at))

    def _shared(self, tenant: Tenant, accessible: bool) -> Shared:
        return self._projects.shared_with(tenant) if accessible else {}

    def _register(
        self,
        tenant: Tenant,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, str],
        optimizer: Optimizer,
    ) -> Run:
        self._sessions.require(tenant, session_id)
        check_seq(model_seq_id, "model_seq_id")
        run_id = f"{session_id}:train:{model_seq_id}"
        known = self._open.get(run_id) or self._catalog.run(tenant, run_id)
        if known is not None:
            return known
        loaded = [run for run in self._open.values() if run.tenant_id == tenant.tenant_id and not run.corrupted]
        if len(loaded) >= self._limits.max_runs_per_tenant:
            raise QuotaExceeded(
                f"{len(loaded)} runs of yours are loaded; limits.max_runs_per_tenant is "
                f"{self._limits.max_runs_per_tenant}: unload one first"
            )
        moment = now()
        run = Run(
            run_id=run_id,
            tenant_id=tenant.tenant_id,
            session_id=session_id,
            model_seq_id=model_seq_id,
            base_model=base_model,
            spec=spec,
            status="creating",
            created_at=moment,
            last_request_at=moment,
            user_metadata=dict(user_metadata),
            optimizer=optimizer,
        )
        self._catalog.add_run(run)
        self._open[run_id] = run
        self._scheduler.open(run, _CREATION_SEQ)
        return run

    @contextmanager
    def _closing_if_it_fails(self, run: Run) -> Iterator[None]:
        """A run that never began takes no more operations."""
        try:
            yield
        except TuftError:
            if run.run_id in self._open:
                self._close(run, "failed")
            raise

    async def _place(self, run: Run, command: Command) -> None:
        """Put the run's adapter into the engine; from then on the run is live."""
        await self._scheduler.ask(command)
        if run.run_id not in self._open:  # unloaded meanwhile: the engine drops the adapter after this command
            raise RunLost(f"run {run.run_id} was unloaded before it could begin")
        self._scheduler.mark_live(run.run_id)
        self._set_status(run, "live")

    def _set_status(self, run: Run, status: RunStatus) -> None:
        if run.status != status:
            self._catalog.set_run_status(run.run_id, status)
        if run.run_id in self._open:
            self._open[run.run_id] = replace(run, status=status)

    def _close(self, run: Run, status: RunStatus) -> None:
        self._set_status(run, status)
        self._open.pop(run.run_id, None)
        self._scheduler.close(run.run_id, RunLost(f"run {run.run_id} is {status}"))


def _require_same(checkpoint: Checkpoint, optimizer: Optimizer) -> None:
    """Moments of one optimizer mean nothing to another."""
    if checkpoint.optimizer != optimizer:
        allowed = f"its optimizer is {checkpoint.optimizer!r}, the run's is {optimizer!r}: load the weights alone"
        raise InvalidInput("path", str(checkpoint.path), allowed)


def _unknown(run_id: str) -> NotFound:
    return NotFound(f"model_id: {run_id!r} is unknown")
