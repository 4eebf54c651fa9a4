"""What is counted, when it is written, and what may be asked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from tuft.config import Config
from tuft.errors import InvalidInput
from tuft.metering import UsageKey, UsageRow, rate_of
from tuft.records import Checkpoint, CheckpointPath, Run, Session, Tenant, now
from tuft.sections import PricesSection
from tuft.service.pace import Pace
from tuft.service.prices import Prices
from tuft.service.projects import Projects
from tuft.service.quotas import Quotas
from tuft.service.traces import Span
from tuft.service.usage import Usage
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.db import Database, open_database
from tuft.store.paces import PaceTable
from tuft.store.quotas import QuotaTable
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog
from tuft.store.usage import FOLDED, UsageTable
from tuft.types import LoraSpec

ALICE, BOB = Tenant("tenant-a", "alice"), Tenant("tenant-b", "bob")
HOUR = timedelta(hours=1)
PRICES = Prices(PricesSection(train=0.5))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    for tenant in (ALICE, BOB):
        TenantCatalog(opened).ensure_tenant(tenant)
    session = Session("s", ALICE.tenant_id, now(), (), {"k": "v"}, "0", None, project_id="p")
    SessionCatalog(opened).add(session)
    moment = now()
    run = Run("s:train:0", ALICE.tenant_id, "s", 0, "m", LoraSpec(), "live", moment, moment, {})
    Catalog(opened).add_run(run)
    yield opened
    opened.close()


@pytest.fixture
def table(database: Database) -> UsageTable:
    return UsageTable(database)


@pytest.fixture
def quotas(database: Database, table: UsageTable) -> Quotas:
    return Quotas(QuotaTable(database), table, PRICES, Config())


@pytest.fixture
def usage(database: Database, table: UsageTable, quotas: Quotas) -> Usage:
    return Usage(table, Projects(()), PRICES, quotas, Pace(PaceTable(database)), retention_days=400)


def span(session_id: str = "s", model: str = "m") -> Span:
    return Span(ALICE.tenant_id, session_id, model, "run", "forward", {})


def this_hour() -> datetime:
    return now().replace(minute=0, second=0, microsecond=0)


async def rows(usage: Usage, tenant: Tenant = ALICE) -> list[UsageRow]:
    return await usage.between(tenant, this_hour() - HOUR, this_hour() + HOUR)


async def test_counts_add_up_in_the_ledger(usage: Usage, table: UsageTable) -> None:
    for quantities in ({"training": 5, "prefill_cached": 0}, {"training": 6}):
        table.add(usage.of(span(), quantities))
    (row,) = await rows(usage)
    assert (row.kind, row.quantity, row.session_id, row.base_model) == ("training", 11, "s", "m")
    assert (row.project_id, row.user_metadata) == ("p", {"k": "v"})
    assert row.cost == 11 * 0.5 / 1e6
    assert await rows(usage, BOB) == []


async def test_a_row_keeps_the_price_that_it_was_used_at_and_joins_keys(usage: Usage, table: UsageTable) -> None:
    for rate in (rate_of(0.5), rate_of(0.25)):
        for number in (1, 2):
            key = UsageKey(ALICE.tenant_id, this_hour(), "s", "m", "training", number, rate)
            table.add({key: 10})
    assert sorted((row.quantity, row.cost) for row in await rows(usage)) == [(20, 5e-06), (20, 1e-05)]
    sums = {(one.key_number, one.rate): one.quantity for one in table.sums(FOLDED, ALICE.tenant_id)}
    assert sums == {(number, rate): 10 for number in (1, 2) for rate in (rate_of(0.5), rate_of(0.25))}


async def test_rows_come_by_hour_and_then_by_tokens(usage: Usage, table: UsageTable) -> None:
    table.add(usage.of(span(), {"checkpoint": 99}))
    for model, quantity in (("a", 1), ("b", 3), ("c", 2)):
        table.add(usage.of(span(model=model), {"sample": quantity}))
    assert [row.base_model for row in await rows(usage)] == ["b", "c", "a", "m"]


async def test_what_is_stored_is_counted_by_the_time_it_is(usage: Usage, database: Database) -> None:
    for name, expires_at in (("a", None), ("b", now() - HOUR)):
        path = CheckpointPath("s:train:0", "training", name)
        CheckpointCatalog(database).put(
            Checkpoint(path, ALICE.tenant_id, "m", LoraSpec(), name, 1000, True, now(), expires_at, {})
        )
    for _ in range(2):
        await usage.measure_storage(elapsed_s=30.0)
    (row,) = await rows(usage)
    assert (row.kind, row.quantity, row.session_id, row.project_id) == ("storage", 60_000, None, None)
    (stored,) = usage.storage(ALICE, None)
    assert (stored.project_id, stored.owner, stored.num_checkpoints, stored.num_bytes) == ("p", ALICE, 1, 1000)
    assert usage.storage(ALICE, "p") == [stored]
    assert usage.storage(ALICE, "default") == usage.storage(BOB, None) == []


async def test_old_rows_are_added_up_and_what_was_spent_is_not_forgotten(usage: Usage, table: UsageTable) -> None:
    for model in ("m", "m", "n"):
        table.add(usage.of(span(model=model), {"training": 5}))
    table.fold_before(this_hour())
    assert len(await rows(usage)) == 2
    for _ in range(2):
        table.fold_before(this_hour() + HOUR)
        assert await rows(usage) == []
        assert sorted(one.quantity for one in table.sums(FOLDED)) == [5, 10]


@pytest.mark.parametrize(
    ("since_h", "until_h", "minutes", "field"),
    [
        (-1, 0, 1, "starting_on"),
        (1, 2, 0, "starting_on"),
        (0, 0, 0, "ending_before"),
        (0, -1, 0, "ending_before"),
        (-14 * 24, 1, 0, "ending_before"),
    ],
)
async def test_a_window_that_cannot_be_answered_is_refused(
    usage: Usage, since_h: int, until_h: int, minutes: int, field: str
) -> None:
    since = this_hour() + since_h * HOUR + timedelta(minutes=minutes)
    with pytest.raises(InvalidInput) as caught:
        await usage.between(ALICE, since, this_hour() + until_h * HOUR)
    assert caught.value.field == field


async def test_fourteen_days_can_be_asked_for(usage: Usage, table: UsageTable) -> None:
    table.add(usage.of(span(), {"training": 5}))
    assert len(await usage.between(ALICE, this_hour() + HOUR - timedelta(days=14), this_hour() + HOUR)) == 1
