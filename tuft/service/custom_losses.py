"""Losses that clients wrote: checked by the engine once, kept with their session, named by its runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from tuft.engine.base import CheckCustomLoss
from tuft.errors import InvalidInput, QuotaExceeded, ServerError, StorageError, TuftError, UserError, refusing
from tuft.losses import CustomLoss
from tuft.records import FutureKey, JournaledFuture, Run, Tenant
from tuft.service.calls import CheckLoss, Rejected
from tuft.service.futures import Futures
from tuft.service.scheduler import Scheduler
from tuft.service.sessions import Sessions
from tuft.service.settlements import failure
from tuft.service.validation import check_seq
from tuft.store.custom_losses import CustomLossTable
from tuft.types import CustomLossCreated, FutureResult


class CustomLosses:
    """A loss may be used by the runs of the session that created it, until the session is over."""

    def __init__(
        self, table: CustomLossTable, scheduler: Scheduler, sessions: Sessions, futures: Futures, max_losses: int
    ) -> None:
        """``max_losses``: of one session."""
        self._table = table
        self._scheduler = scheduler
        self._sessions = sessions
        self._max_losses = max_losses
        self._futures = futures

    async def create(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, loss: CustomLoss) -> str:
        """Future: CustomLossCreated, or InvalidInput that names what the loss may not do. A retry of (session,
        custom_loss_seq_id) gets the first call's. Raises NotFound for a session that is not the tenant's."""
        return await self._start(tenant, session_id, custom_loss_seq_id, CheckLoss(session_id, loss))

    async def reject(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, error: TuftError) -> str:
        """A future that fails with ``error``, as that of any loss that cannot be had."""
        refused = failure(error)
        return await self._start(tenant, session_id, custom_loss_seq_id, Rejected(refused.message, refused.category))

    async def resume(self, pending: Sequence[JournaledFuture]) -> None:
        """After a restart: check what an earlier server had accepted."""
        for known in pending:
            try:
                call = await self._futures.request(known.future_id)
            except StorageError as error:  # this one fails, the others go on
                call = Rejected(error.told, "server")
            self._scheduler.errands.resume(
                known.future_id, partial(self._check, Tenant(known.tenant_id, ""), known.key, call)
            )

    def named_by(self, run: Run, loss_fn_config: Mapping[str, float | str]) -> CustomLoss:
        """The loss of the run's session that the config of ``custom`` names; raises InvalidInput."""
        for key in loss_fn_config.keys() - {"loss_id"}:
            raise InvalidInput("loss_fn_config", key, "custom takes loss_id")
        loss_id = loss_fn_config.get("loss_id")
        loss = self._table.get(run.session_id, loss_id) if isinstance(loss_id, str) else None
        if loss is None:
            allowed = "must be the id of a loss that ServiceClient.create_custom_loss created in this session"
            raise refusing("custom_loss", str(loss_id), InvalidInput("loss_fn_config.loss_id", loss_id, allowed))
        return loss

    async def sweep(self) -> None:
        """Forget the losses of sessions that are over."""
        for session_id in filter(self._sessions.is_over, await asyncio.to_thread(self._table.sessions)):
            await asyncio.to_thread(self._table.delete, session_id)

    async def _start(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, call: CheckLoss | Rejected) -> str:
        self._sessions.require(tenant, session_id)
        check_seq(custom_loss_seq_id, "custom_loss_seq_id")
        key = FutureKey("custom_loss", session_id, custom_loss_seq_id)
        return await self._scheduler.errands.start(tenant, key, call, partial(self._check, tenant, key, call))

    async def _check(self, tenant: Tenant, key: FutureKey, call: CheckLoss | Rejected) -> FutureResult:
        if isinstance(call, Rejected):
            raise UserError(call.message) if call.category == "user" else ServerError(call.message)
        loss_id = f"{key.subject_id}:loss:{key.seq}"
        if self._table.get(key.subject_id, loss_id) is None:
            self._require_room(key.subject_id)
            await self._scheduler.replies.ask(CheckCustomLoss(call.loss))
            self._require_room(key.subject_id)  # others may have come meanwhile
            self._table.add(tenant, key.subject_id, key.seq, loss_id, call.loss)
        return CustomLossCreated(loss_id)

    def _require_room(self, session_id: str) -> None:
        if self._table.count(session_id) >= self._max_losses:
            allowed = f"limits.max_custom_losses is {self._max_losses}, for one session"
            raise QuotaExceeded(f"this session has {self._max_losses} custom losses; {allowed}")
