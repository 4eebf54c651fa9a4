"""The audit log: who saved, read, shared, deleted or changed what, as each tenant may see it of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day

from tuft.records import AuditEntry, Operator, Tenant, now
from tuft.store.audit import AuditLog, NewEntry

RESOURCES: Mapping[str, tuple[str, ...] | None] = {
    "all": None,
    "checkpoints": ("checkpoint",),
    "projects": ("project",),
    "teams": ("team",),  # there are none
    "organizations": ("key", "tenant"),  # a tenant's keys are what an organization's roles are elsewhere
}
"""What the API may ask for, and the first words of the events that are about it."""
DENIED = "access_denied"
"""A tenant asked for what is another's: for the operator's eyes alone. To whom it was refused it would tell that the id
exists, which no answer does."""
_MAX_ENTRIES = 20_000  # of one answer
_SWEEP_INTERVAL_S = 3600.0


class Audit:
    """Entries are written at once: a row each, for whoever did it and for whose thing it was."""

    def __init__(self, log: AuditLog, retention_days: float) -> None:
        self._log = log
        self._retention = timedelta(days=retention_days)
        self._next_sweep_s = 0.0

    def note(
        self, actor: Tenant | Operator, event: str, owner_id: str | None = None, **details: str | int | None
    ) -> None:
        """``event`` reads ``<resource>_<action>``; ``owner_id`` is the tenant whose thing it was, if not the actor. An
        operator is no tenant: what they do is always somebody's, who then sees it."""
        entry = entry_of(actor, event, owner_id, details)
        self._log.add(entry.tenant_ids, entry.at, entry.event, entry.details)

    def note_refusal(self, concerned_id: str, actor_urn: str, event: str, **details: str) -> None:
        """Somebody was refused what exists: seen by the tenant ``concerned_id``, unless the event is ``DENIED``."""
        self._log.add([concerned_id], now(), event, {"actor": actor_urn, **details})

    async def of_day(
        self, tenant: Tenant | None, event_type: str, day: date, *, for_operator: bool = False
    ) -> list[AuditEntry]:
        """The tenant's entries of a day (UTC), or everyone's, oldest first: one that concerns two tenants stands there
        for each. Of a day with too many the newest, behind an entry that says how many are left out."""
        if day > now().date():
            return []
        since = datetime.combine(day, time_of_day(), UTC)
        resources = RESOURCES[event_type]
        entries, total = await asyncio.to_thread(
            self._log.newest,
            None if tenant is None else tenant.tenant_id,
            resources,
            since,
            since + timedelta(days=1),
            _MAX_ENTRIES,
            () if for_operator else (DENIED,),
        )
        if total > len(entries):
            entries.insert(0, AuditEntry(entries[0].at, "audit_omitted", {"num_entries": total - len(entries)}))
        return entries

    async def sweep(self) -> None:
        """Now and then: forget what is older than the retention."""
        if time.monotonic() >= self._next_sweep_s:
            self._next_sweep_s = time.monotonic() + _SWEEP_INTERVAL_S
            await asyncio.to_thread(self._log.delete_before, now() - self._retention)


def entry_of(
    actor: Tenant | Operator, event: str, owner_id: str | None, details: Mapping[str, str | int | None]
) -> NewEntry:
    """What ``Audit.note`` writes, for those who write it together with the change."""
    concerned = {actor.tenant_id} if isinstance(actor, Tenant) else set()
    if owner_id is not None:
        concerned.add(owner_id)
    assert concerned
    return NewEntry(frozenset(concerned), now(), event, {"actor": actor.urn, **details})
