"""Losses that clients wrote: checked by the engine once, kept with their session, named by its runs."""

from __future__ import annotations

from collections.abc import Mapping

from tuft.engine.base import CheckCustomLoss
from tuft.errors import InvalidInput, QuotaExceeded, TuftError
from tuft.losses import CustomLoss
from tuft.records import Run, Tenant
from tuft.service.queue import Barrier
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.validation import check_seq
from tuft.store.custom_losses import CustomLossTable
from tuft.types import CustomLossCreated, FutureResult

MAX_LOSSES = 128
"""Of one session."""


class CustomLosses:
    """A loss may be used by the runs of the session that created it, until the session is over."""

    def __init__(self, table: CustomLossTable, scheduler: Scheduler, sessions: Sessions) -> None:
        self._table = table
        self._scheduler = scheduler
        self._sessions = sessions
        self._future_of_loss: dict[str, str] = {}

    def create(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, loss: CustomLoss) -> str:
        """Future: CustomLossCreated, or InvalidInput that names what the loss may not do. A retry of (session,
        custom_loss_seq_id) gets the first call's. Raises NotFound for a session that is not the tenant's."""
        loss_id = _loss_id(session_id, custom_loss_seq_id)

        async def check() -> FutureResult:
            if self._table.get(session_id, loss_id) is None:
                await self._scheduler.ask(CheckCustomLoss(loss))
                if self._table.count(session_id) >= MAX_LOSSES:
                    raise QuotaExceeded(f"this session has {MAX_LOSSES} custom losses, as many as one may have")
                self._table.add(tenant, session_id, custom_loss_seq_id, loss_id, loss)
            return CustomLossCreated(loss_id)

        return self._start(tenant, session_id, custom_loss_seq_id, check)

    def reject(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, error: TuftError) -> str:
        """A future that fails with ``error``, as that of any loss that cannot be had."""

        async def fail() -> FutureResult:
            raise error

        return self._start(tenant, session_id, custom_loss_seq_id, fail)

    def named_by(self, run: Run, loss_fn_config: Mapping[str, float | str]) -> CustomLoss:
        """The loss of the run's session that the config of ``custom`` names; raises InvalidInput."""
        for key in loss_fn_config.keys() - {"loss_id"}:
            raise InvalidInput("loss_fn_config", key, "custom takes loss_id")
        loss_id = loss_fn_config.get("loss_id")
        loss = self._table.get(run.session_id, loss_id) if isinstance(loss_id, str) else None
        if loss is None:
            allowed = "must be the id of a loss that ServiceClient.create_custom_loss created in this session"
            raise InvalidInput("loss_fn_config.loss_id", loss_id, allowed)
        return loss

    def sweep(self) -> None:
        """Forget the retries of futures that are no longer kept, and the losses of sessions that are over."""
        for session_id in filter(self._sessions.is_over, self._table.sessions()):
            self._table.delete(session_id)
        self._future_of_loss = {
            loss_id: future_id
            for loss_id, future_id in self._future_of_loss.items()
            if self._scheduler.knows(future_id)
        }

    def _start(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, work: Barrier) -> str:
        self._sessions.require(tenant, session_id)
        check_seq(custom_loss_seq_id, "custom_loss_seq_id")
        loss_id = _loss_id(session_id, custom_loss_seq_id)
        known = self._future_of_loss.get(loss_id)
        if known is None or not self._scheduler.knows(known):
            known = self._future_of_loss[loss_id] = self._scheduler.start(tenant.tenant_id, work)
        return known


def _loss_id(session_id: str, custom_loss_seq_id: int) -> str:
    return f"{session_id}:loss:{custom_loss_seq_id}"
