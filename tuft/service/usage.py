"""What tenants used, by the hour: the ledger's rows, with what they cost."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime, timedelta

from tuft.errors import InvalidInput
from tuft.metering import UsageKey, UsageRow
from tuft.records import CheckpointStorage, Tenant, now
from tuft.service.pace import Pace
from tuft.service.prices import Prices
from tuft.service.projects import Projects
from tuft.service.quotas import TOKEN_KINDS, Quotas
from tuft.service.traces import Span
from tuft.store.usage import UsageTable

_MEASURE_INTERVAL_S = 60.0
_SWEEP_INTERVAL_S = 3600.0
_MAX_WINDOW = timedelta(days=14)
_MAX_ROWS = 100_000  # of one answer


class Usage:
    """``TOKEN_KINDS`` count tokens; ``checkpoint`` counts checkpoints that were saved, ``storage`` bytes times the
    seconds for which they were kept."""

    def __init__(
        self,
        table: UsageTable,
        projects: Projects,
        prices: Prices,
        quotas: Quotas,
        pace: Pace,
        retention_days: float,
    ) -> None:
        self._table = table
        self._projects = projects
        self._prices = prices
        self._quotas = quotas
        self._pace = pace
        self._retention = timedelta(days=retention_days)
        self._measured_at_s = time.monotonic()
        self._next_sweep_s = 0.0

    def of(self, span: Span, quantities: Mapping[str, int]) -> dict[UsageKey, int]:
        """What the request of ``span`` used, by kind, as the ledger counts it: in this hour, at today's prices."""
        hour = _this_hour()
        return {
            UsageKey(
                span.tenant_id,
                hour,
                span.session_id,
                span.base_model,
                kind,
                span.key_number,
                self._prices.rate(kind, span.base_model),
            ): quantity
            for kind, quantity in quantities.items()
            if quantity
        }

    async def sweep(self) -> None:
        """Measure what is stored, and now and then add up what is too old."""
        moment_s = time.monotonic()
        if moment_s - self._measured_at_s >= _MEASURE_INTERVAL_S:
            elapsed_s, self._measured_at_s = moment_s - self._measured_at_s, moment_s
            await self._pace.keep()
            await self.measure_storage(elapsed_s)
        if moment_s >= self._next_sweep_s:
            self._next_sweep_s = moment_s + _SWEEP_INTERVAL_S
            await asyncio.to_thread(self._table.fold_before, now() - self._retention)

    async def flush(self) -> None:
        """Write what is kept in memory: the pace. The ledger itself is always written."""
        await self._pace.keep()

    async def measure_storage(self, elapsed_s: float) -> None:
        """Count what is stored at this moment as having been stored for ``elapsed_s``."""
        counted: dict[UsageKey, int] = defaultdict(int)
        for (tenant_id, base_model), num_bytes in (await asyncio.to_thread(self._table.stored_bytes)).items():
            rate = self._prices.rate("storage", base_model)
            counted[UsageKey(tenant_id, _this_hour(), "", base_model, "storage", 0, rate)] += round(
                num_bytes * elapsed_s
            )
        self._quotas.count(counted)
        await asyncio.to_thread(self._table.add, counted)

    async def between(self, tenant: Tenant, since: datetime, until: datetime) -> list[UsageRow]:
        """The tenant's usage by the hour, most tokens first within one. Raises InvalidInput for a window that cannot be
        answered."""
        _check_window(since, until)
        rows = await asyncio.to_thread(self._table.between, tenant.tenant_id, since, until, _MAX_ROWS + 1)
        if len(rows) > _MAX_ROWS:
            raise InvalidInput("ending_before", until.isoformat(), f"more than {_MAX_ROWS} rows: ask for fewer hours")
        return sorted(rows, key=lambda row: (row.hour, -row.quantity if row.kind in TOKEN_KINDS else 0))

    def storage(self, tenant: Tenant, project_id: str | None) -> list[CheckpointStorage]:
        """What checkpoints hold now: the tenant's own, and those of the projects it shares. Raises InvalidInput for
        what can be no project."""
        if project_id is not None:
            self._projects.check(tenant, project_id)
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
