"""What tenants used, by the hour: counted in memory, written down by the sweep. Nothing costs anything here."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import datetime, timedelta

from tuft.errors import InvalidInput
from tuft.records import CheckpointStorage, Tenant, UsageKey, UsageRow, now
from tuft.service.projects import Projects
from tuft.service.traces import Span
from tuft.store.usage import UsageTable

TOKEN_KINDS = ("training", "prefill", "prefill_cached", "sample")
_MEASURE_INTERVAL_S = 60.0
_SWEEP_INTERVAL_S = 3600.0
_MAX_WINDOW = timedelta(days=14)
_MAX_ROWS = 100_000  # of one answer


class Usage:
    """``TOKEN_KINDS`` count tokens; ``checkpoint`` counts checkpoints that were saved, ``storage`` bytes times the
    seconds for which they were kept."""

    def __init__(self, table: UsageTable, projects: Projects, retention_days: float) -> None:
        self._table = table
        self._projects = projects
        self._retention = timedelta(days=retention_days)
        self._counted: Counter[UsageKey] = Counter()
        self._measured_at_s = time.monotonic()
        self._next_sweep_s = 0.0

    def add(self, span: Span, kind: str, quantity: int) -> None:
        """Count it for the session of ``span``, in this hour."""
        if quantity:
            self._counted[UsageKey(span.tenant_id, _this_hour(), span.session_id, span.base_model, kind)] += quantity

    def flush(self) -> None:
        """Write what was counted since the last time."""
        if self._counted:
            self._table.add(self._counted)
            self._counted = Counter()

    def sweep(self) -> None:
        """Measure what is stored, write what was counted, and now and then forget what is too old."""
        moment_s = time.monotonic()
        if moment_s - self._measured_at_s >= _MEASURE_INTERVAL_S:
            self.measure_storage(moment_s - self._measured_at_s)
            self._measured_at_s = moment_s
        self.flush()
        if moment_s >= self._next_sweep_s:
            self._next_sweep_s = moment_s + _SWEEP_INTERVAL_S
            self._table.delete_before(now() - self._retention)

    def measure_storage(self, elapsed_s: float) -> None:
        """Count what is stored at this moment as having been stored for ``elapsed_s``."""
        for (tenant_id, base_model), num_bytes in self._table.stored_bytes().items():
            key = UsageKey(tenant_id, _this_hour(), "", base_model, "storage")
            self._counted[key] += round(num_bytes * elapsed_s)

    async def between(self, tenant: Tenant, since: datetime, until: datetime) -> list[UsageRow]:
        """The tenant's usage by the hour, most tokens first within one. Raises InvalidInput for a window that cannot be
        answered."""
        _check_window(since, until)
        self.flush()
        rows = await asyncio.to_thread(self._table.between, tenant.tenant_id, since, until, _MAX_ROWS + 1)
        if len(rows) > _MAX_ROWS:
            raise InvalidInput("ending_before", until.isoformat(), f"more than {_MAX_ROWS} rows: ask for fewer hours")
        return sorted(rows, key=lambda row: (row.hour, -row.quantity if row.kind in TOKEN_KINDS else 0))

    def storage(self, tenant: Tenant, project_id: str | None) -> list[CheckpointStorage]:
        """What checkpoints hold now: the tenant's own, and those of the projects it shares. Raises Forbidden for a
        project of others."""
        if project_id is not None:
            self._projects.check_member(tenant, project_id)
        return self._table.storage(tenant, self._projects.shared_with(tenant), project_id)


def _this_hour() -> datetime:
    return now().replace(minute=0, second=0, microsecond=0)


def _check_window(since: datetime, until: datetime) -> None:
    for field, moment in (("starting_on", since), ("ending_before", until)):
        if moment != moment.replace(minute=0, second=0, microsecond=0):
            raise InvalidInput(field, moment.isoformat(), "must be a full hour (UTC)")
    if since > now():
        raise InvalidInput("starting_on", since.isoformat(), "must not be in the future")
    if not since < until <= since + _MAX_WINDOW:
        allowed = f"must be after starting_on, by at most {_MAX_WINDOW.days} days"
        raise InvalidInput("ending_before", until.isoformat(), allowed)
