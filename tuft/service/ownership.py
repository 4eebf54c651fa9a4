"""Who reaches for what is another tenant's.

Services find a tenant's things by queries that have the tenant among their conditions (``store.ownership``), and refuse
what was not found: nobody's id and another tenant's alike (``errors.refusing``). Every such refusal is told here by
whoever makes an answer of it: ``api.refusals`` of those that become a status, ``activity`` of those that fail a future.
Only here is it asked whether the thing exists: later and beside all requests, so that neither an answer nor its time
can tell. If it is another tenant's, the audit log gets a row.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import NamedTuple

import structlog

from tuft.errors import StorageError
from tuft.records import Tenant
from tuft.service.audit import DENIED, Audit
from tuft.store.ownership import Owners

log = structlog.get_logger(__name__)

LINK_DENIED = "link_denied"
"""Somebody without a key followed a link that is not, or no longer, good: its owner sees that."""
_ANYONE = "urn:tuft:anyone"
_CHECK_AFTER_S = 0.5
_NOTED_FOR_S = 60.0
_MAX_WAITING = 1000  # of one tenant
_MAX_NOTED = 100_000
_MAX_ID = 512  # no id of ours is as long


class Reach(NamedTuple):
    """An id that a tenant asked for in vain. ``tenant_id`` is None for whoever called without a key."""

    tenant_id: str | None
    kind: str
    named: str


class Ownership:
    """One who tries the same id again within a minute leaves one row; of more than a thousand ids at once, the rest is
    only counted. So nobody fills the disk with rows, or keeps others waiting by them."""

    def __init__(self, owners: Owners, audit: Audit) -> None:
        self._owners = owners
        self._audit = audit
        self._waiting: dict[Reach, str] = {}  # with what was called
        self._num_waiting: Counter[str | None] = Counter()
        self._num_unchecked: Counter[str | None] = Counter()
        self._noted_at_s: dict[Reach, float] = {}
        self._is_told = asyncio.Event()

    def refused(self, what: tuple[str, str], action: str, tenant_id: str | None = None) -> None:
        """Nothing of that kind and id (``TuftError.refused``) was the tenant's, who asked for it by ``action``. This
        takes no time, and the same whatever the id is."""
        reach = Reach(tenant_id, *what)
        if reach in self._waiting or len(reach.named) > _MAX_ID:
            return
        if self._num_waiting[tenant_id] >= _MAX_WAITING:
            self._num_unchecked[tenant_id] += 1
            return
        self._waiting[reach] = action
        self._num_waiting[tenant_id] += 1
        self._is_told.set()

    def told_of_project(self, tenant: Tenant, project_id: str) -> None:
        """The tenant named a project of which they are no member."""
        self.refused(("project", project_id), "project", tenant.tenant_id)

    async def serve(self) -> None:
        """Look into what was refused; runs until cancelled."""
        while True:
            await self._is_told.wait()
            await asyncio.sleep(_CHECK_AFTER_S)
            await self.look_into_all()

    async def look_into_all(self) -> None:
        """Write a row for every thing that was refused and is another tenant's."""
        self._is_told.clear()
        waiting, unchecked = self._waiting, self._num_unchecked
        self._waiting, self._num_waiting, self._num_unchecked = {}, Counter(), Counter()
        if waiting:
            await asyncio.to_thread(self._look_into, waiting)
        for tenant_id, num_ids in unchecked.items():
            log.warning("more ids were refused than are looked into", tenant_id=tenant_id, num_ids=num_ids)

    def _look_into(self, waiting: dict[Reach, str]) -> None:
        moment_s = time.monotonic()
        self._noted_at_s = {
            reach: noted_at_s for reach, noted_at_s in self._noted_at_s.items() if moment_s - noted_at_s < _NOTED_FOR_S
        }
        for reach, action in waiting.items():
            if reach in self._noted_at_s or len(self._noted_at_s) >= _MAX_NOTED:
                continue
            try:
                if self._note(reach, action):
                    self._noted_at_s[reach] = moment_s
            except StorageError as error:
                log.error("a refused id could not be looked into", error=str(error))

    def _note(self, reach: Reach, action: str) -> bool:
        """Write the row if the thing is another tenant's. A project is, or nothing would have been told."""
        owner_id = "" if reach.kind == "project" else self._owners.owner(reach.kind, reach.named)
        if owner_id is None or owner_id == reach.tenant_id:
            return False
        details = {"kind": reach.kind, "id": reach.named, "action": action}
        if reach.tenant_id is None:
            self._audit.note_refusal(owner_id, _ANYONE, LINK_DENIED, **details)
        else:
            tenant = Tenant(reach.tenant_id, self._owners.name(reach.tenant_id))
            self._audit.note_refusal(tenant.tenant_id, tenant.urn, DENIED, **details)
        return True
