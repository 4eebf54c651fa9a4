"""Parts of the service floor on a real database and a real journal, without an engine."""

from __future__ import annotations

from pathlib import Path

from tuft.config import load_config
from tuft.records import FutureKey, Tenant
from tuft.service.calls import ENCODING, UnloadRun
from tuft.service.futures import Futures
from tuft.service.prices import Prices
from tuft.service.quotas import Quotas
from tuft.service.retention import Retention
from tuft.store.db import Database
from tuft.store.journal import Journal
from tuft.store.quotas import QuotaTable
from tuft.store.spool import Spool
from tuft.store.tenants import TenantCatalog
from tuft.store.usage import UsageTable

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")


def make_futures(
    database: Database,
    home: Path,
    *,
    read_retention_s: float = 60.0,
    unread_retention_s: float = 60.0,
    max_pending: int = 1000,
    cache_bytes: int = 2**20,
) -> Futures:
    """One life of a server's futures, started. ``close`` ends it."""
    for tenant in (ALICE, BOB):
        TenantCatalog(database).ensure_tenant(tenant)
    config = load_config(home=home, **{"limits.max_pending_per_tenant": max_pending})
    quotas = Quotas(QuotaTable(database), UsageTable(database), Prices(config.prices), config)
    journal = Journal(database, Spool(home / "journal"))
    retention = Retention(journal, read_retention_s, unread_retention_s)
    futures = Futures(journal, ENCODING, quotas, retention, cache_bytes=cache_bytes)
    futures.start()
    return futures


async def accepted(futures: Futures, seq: int, tenant: Tenant = ALICE, sent: object = None, run: str = "run") -> str:
    """The future of a request that the journal has."""
    request = sent or UnloadRun(run)
    prepared = futures.prepare(request, lambda: (request, 0))
    future_id, _ = await futures.accept(tenant, FutureKey("operation", run, seq), "request", prepared)
    return future_id
