"""What is refused and why, and that the sum of what was used and what is reserved never passes a cap."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuft.config import Config
from tuft.errors import CapReached, QuotaExceeded
from tuft.metering import Charge, Holder, QuotaName, UsageKey, rate_of
from tuft.records import Tenant, now
from tuft.service.prices import Prices
from tuft.service.quotas import Quotas
from tuft.store.db import Database, open_database
from tuft.store.quotas import QuotaTable
from tuft.store.tenants import TenantCatalog
from tuft.store.usage import UsageTable

ALICE = Tenant("tenant-a", "alice", key_number=7)
OTHER_KEY = Tenant("tenant-a", "alice", key_number=8)
BOB = Tenant("tenant-b", "bob", key_number=9)
Make = Callable[..., Quotas]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    for tenant in (ALICE, BOB):
        TenantCatalog(opened).ensure_tenant(tenant)
    yield opened
    opened.close()


@pytest.fixture
def make(database: Database) -> Make:
    """``make(tokens_per_day=10)``: the quotas of a server that has just started."""

    def new(prices: dict[str, Any] | None = None, limits: dict[str, Any] | None = None, **quotas: Any) -> Quotas:
        config = Config(quotas=quotas, prices=prices or {}, limits=limits or {})
        return Quotas(QuotaTable(database), UsageTable(database), Prices(config.prices), config)

    return new


def used(tenant: Tenant, tokens: int, price: float = 0.0, days_ago: int = 0) -> dict[UsageKey, int]:
    hour = now().replace(minute=0, second=0, microsecond=0) - timedelta(days=days_ago)
    return {UsageKey(tenant.tenant_id, hour, "s", "m", "training", tenant.key_number, rate_of(price)): tokens}


def training(tokens: int) -> Charge:
    return Charge("m", {"training": tokens})


def put(database: Database, tenant: Tenant, key_number: int = 0, **values: float | None) -> None:
    named = cast("dict[QuotaName, float | None]", values)
    QuotaTable(database).set(Holder(tenant.tenant_id, key_number), named, ())


def test_nothing_is_limited_that_nobody_limits(make: Make) -> None:
    quotas = make()
    for number in range(100):
        quotas.admit(ALICE)
        quotas.reserve(f"future-{number}", ALICE, training(10**12))


def test_tokens_of_a_day_are_those_used_and_those_that_waiting_work_may_use(make: Make) -> None:
    quotas = make(tokens_per_day=100)
    quotas.reserve("a", ALICE, training(60))
    with pytest.raises(CapReached, match=r"tenant alice has used 0 tokens, 60 tokens are reserved.* asks for 50"):
        quotas.reserve("b", ALICE, training(50))
    quotas.reserve("bobs", BOB, training(100))
    quotas.settle("a", used(ALICE, 20))
    quotas.reserve("b", ALICE, training(50))
    quotas.release("b")
    with pytest.raises(CapReached) as caught:
        quotas.reserve("c", ALICE, training(81))
    assert "quotas.tokens_per_day is 100 tokens; free again at " in str(caught.value)
    assert 0 < (caught.value.retry_after_s or 0) <= 24 * 3600


def test_a_refused_request_has_taken_nothing(make: Make) -> None:
    quotas = make(tokens_per_day=100)
    for number in range(10):
        with pytest.raises(CapReached, match="more than this may ever be"):
            quotas.reserve(f"large-{number}", ALICE, training(101))
    quotas.reserve("small", ALICE, training(100))


def test_what_the_ledger_holds_counts_after_a_restart(make: Make, database: Database) -> None:
    UsageTable(database).add(used(ALICE, 70, price=1.0) | used(ALICE, 5, price=1.0, days_ago=400))
    quotas = make(tokens_per_day=100, prices={"train": 1.0})
    with pytest.raises(CapReached, match="used 70 tokens"):
        quotas.reserve("a", ALICE, training(31))
    quotas.reserve("a", ALICE, training(30))
    total = make(spend_total=80e-6, prices={"train": 1.0})
    with pytest.raises(
        CapReached, match=r"spend_total: tenant alice has used 0.000075 USD, and this asks for 0.000006"
    ):
        total.reserve("b", ALICE, training(6))
    total.reserve("b", ALICE, training(5))
    yesterdays = make(spend_per_day=70e-6, spend_per_month=70e-6, prices={"train": 1.0})
    with pytest.raises(CapReached, match=r"spend_per_day: .* free again at .* 00:00 UTC"):
        yesterdays.reserve("c", ALICE, training(1))


def test_what_an_earlier_server_acknowledged_is_reserved_again(make: Make) -> None:
    quotas = make(tokens_per_day=100)
    quotas.take_up("old", ALICE.tenant_id, ALICE.key_number, training(150))
    with pytest.raises(CapReached, match="150 tokens are reserved"):
        quotas.reserve("new", ALICE, training(1))
    quotas.settle("old", used(ALICE, 10))
    quotas.reserve("new", ALICE, training(90))


def test_a_key_has_a_quota_of_its_own_within_its_tenants(make: Make, database: Database) -> None:
    put(database, ALICE, ALICE.key_number, tokens_per_day=10)
    quotas = make(tokens_per_day=15)
    quotas.reserve("a", ALICE, training(10))
    with pytest.raises(CapReached, match="API key 7 has used .* the key's quota is 10 tokens"):
        quotas.reserve("b", ALICE, training(1))
    quotas.reserve("c", OTHER_KEY, training(5))
    with pytest.raises(CapReached, match="tenant alice has used"):
        quotas.reserve("d", OTHER_KEY, training(1))


def test_what_is_set_holds_within_a_second_and_is_forgotten_again(
    make: Make, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuft.service.quotas._REFRESH_INTERVAL_S", 0.0)
    quotas = make(tokens_per_day=1)
    put(database, ALICE, tokens_per_day=None)
    quotas.reserve("a", ALICE, training(1000))
    put(database, ALICE, tokens_per_day=1001)
    with pytest.raises(CapReached, match="the tenant's quota is 1,001 tokens"):
        quotas.reserve("b", ALICE, training(2))
    QuotaTable(database).set(Holder(ALICE.tenant_id), {}, ("tokens_per_day",))
    with pytest.raises(CapReached, match="quotas.tokens_per_day is 1 tokens"):
        quotas.reserve("b", ALICE, training(2))


def test_requests_a_second_are_counted_by_tenant_and_key(make: Make, database: Database) -> None:
    put(database, ALICE, ALICE.key_number, requests_per_s=0.001)
    quotas = make(requests_per_s=0.002)
    quotas.admit(ALICE)
    with pytest.raises(QuotaExceeded, match="requests_per_s: tenant alice sent more than") as caught:
        quotas.admit(OTHER_KEY)
    assert 400 < (caught.value.retry_after_s or 0) <= 500
    quotas.admit(BOB)
    put(database, ALICE, requests_per_s=1000)
    put(database, ALICE, ALICE.key_number, requests_per_s=0.001)
    fresh = make()
    for _ in range(3):
        fresh.admit(OTHER_KEY)
    fresh.admit(ALICE)
    with pytest.raises(QuotaExceeded, match="API key 7 sent more than the key's quota allows, 0.001 a second"):
        fresh.admit(ALICE)


def test_queued_operations_are_limited_by_the_option_of_old(make: Make) -> None:
    quotas = make(limits={"max_pending_per_tenant": 2})
    quotas.reserve("a", ALICE, Charge())
    quotas.reserve("b", ALICE, Charge())
    with pytest.raises(QuotaExceeded, match="limits.max_pending_per_tenant is 2") as caught:
        quotas.reserve("c", ALICE, Charge())
    assert not isinstance(caught.value, CapReached)
    quotas.reserve("bobs", BOB, Charge())
    quotas.release("a")
    quotas.reserve("c", ALICE, Charge())


async def test_of_a_thousand_races_for_the_rest_of_a_cap_none_goes_over_it(make: Make) -> None:
    """Each costs 0.001 to 0.004 and uses less than it reserved; the cap has room for a few hundred."""
    quotas = make(spend_total=0.5, prices={"train": 1.0})
    random.seed(0)
    spent, refused = 0, 0

    async def operation(number: int) -> None:
        nonlocal spent, refused
        most = random.randint(1000, 4000)
        await asyncio.sleep(random.random() / 100)
        try:
            quotas.reserve(f"future-{number}", ALICE, training(most))
        except CapReached:
            refused += 1
            return
        await asyncio.sleep(random.random() / 100)
        real = random.randint(0, most)
        spent += real
        quotas.settle(f"future-{number}", used(ALICE, real, price=1.0))
        assert spent <= 500_000

    await asyncio.gather(*(operation(number) for number in range(1000)))
    assert refused > 0
    quotas.reserve("last", ALICE, training(500_000 - spent))
    with pytest.raises(CapReached):
        quotas.reserve("one more", ALICE, training(1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.data())
def test_in_any_order_of_events_no_cap_is_passed_and_nothing_stays_reserved(make: Make, data: st.DataObject) -> None:
    quotas = make(tokens_per_day=1000)
    waiting: dict[str, int] = {}
    spent = 0
    for number in range(data.draw(st.integers(1, 60))):
        if waiting and data.draw(st.booleans()):
            future_id = data.draw(st.sampled_from(sorted(waiting)))
            real = data.draw(st.integers(0, waiting.pop(future_id)))
            spent += real
            quotas.settle(future_id, used(ALICE, real))
        else:
            most = data.draw(st.integers(0, 400))
            fits = spent + sum(waiting.values()) + most <= 1000
            try:
                quotas.reserve(f"f{number}", ALICE, training(most))
            except CapReached:
                assert not fits
            else:
                assert fits or most == 0
                waiting[f"f{number}"] = most
        assert spent + sum(waiting.values()) <= 1000
        assert quotas.num_waiting(ALICE.tenant_id) == len(waiting)
