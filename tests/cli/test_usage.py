"""`tuft usage`, as it is typed."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Tuft
from tuft.app import open_store
from tuft.config import load_config
from tuft.errors import InvalidInput, NotFound
from tuft.metering import UsageKey, rate_of
from tuft.records import now
from tuft.service.services import open_tenants
from tuft.store.usage import UsageTable


@pytest.fixture
def used(tuft: Tuft, tmp_path: Path) -> Tuft:
    """Two tenants have trained, sampled and stored, today and on a day of this month or the last."""
    for name in ("alice", "bob"):
        tuft("tenant", "create", name)
    config = load_config(home=tmp_path)
    database = open_store(config)
    tenants = open_tenants(config, database)
    hour = now().replace(minute=0, second=0, microsecond=0)
    alice, bob = (tenants.named(name).tenant_id for name in ("alice", "bob"))
    UsageTable(database).add(
        {
            UsageKey(alice, hour, "s", "m", "training", 7, rate_of(2.0)): 1_000_000,
            UsageKey(alice, hour, "s", "n", "sample", 8, rate_of(4.0)): 500_000,
            UsageKey(alice, hour, "", "m", "storage", 0, rate_of(0.1)): 10**9 * 3600,
            UsageKey(alice, hour, "s", "m", "checkpoint", 7, 0): 3,
            UsageKey(bob, hour - timedelta(days=40), "t", "m", "training", 9, rate_of(2.0)): 1_000,
            UsageKey(bob, hour, "t", "m", "training", 9, 0): 10,
        }
    )
    database.close()
    return tuft


def rows(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)["rows"]
    return found


def test_a_row_is_what_is_asked_for_and_costs_what_it_cost(used: Tuft) -> None:
    by_tenant = {row["tenant"]: row for row in rows(used("usage", "--by", "tenant", "--json"))}
    assert by_tenant["alice"]["tokens"] == 1_500_000
    assert by_tenant["alice"]["checkpoints"] == 3
    assert by_tenant["alice"]["byte_seconds"] == 10**9 * 3600
    assert by_tenant["alice"]["cost"] == pytest.approx(2.0 + 2.0 + 0.1 / 720)
    assert by_tenant["bob"] == {"tenant": "bob", "tokens": 10, "cost": 0.0}
    by_key = {row["key"]: row["cost"] for row in rows(used("usage", "--tenant", "alice", "--by", "key", "--json"))}
    assert by_key == {"": pytest.approx(0.1 / 720), "7": 2.0, "8": 2.0}
    today = f"{now():%Y-%m-%d}"
    assert rows(used("usage", "--by", "day,model,kind", "--json", "--tenant", "bob")) == [
        {"day": today, "model": "m", "kind": "training", "tokens": 10, "cost": 0.0}
    ]


def test_other_days_are_told_when_they_are_asked_for(used: Tuft) -> None:
    since = f"{now() - timedelta(days=41):%Y-%m-%d}"
    assert sum(row["tokens"] for row in rows(used("usage", "--tenant", "bob", "--since", since, "--json"))) == 1010
    until = f"{now() - timedelta(days=30):%Y-%m-%d}"
    (row,) = rows(used("usage", "--since", since, "--until", until, "--json"))
    assert (row["tokens"], row["cost"]) == (1000, 0.002)


def test_people_read_a_table(used: Tuft) -> None:
    shown = used("usage")
    assert "1,000,000 tokens" in shown
    assert "USD" in shown
    assert "1.000 gigabyte hours" in shown
    assert "3 checkpoints" in shown
    assert ": nothing" in used("usage", "--since", "2001-01-01", "--until", "2001-01-02")


def test_what_cannot_be_told_is_refused_by_name(used: Tuft) -> None:
    with pytest.raises(InvalidInput, match="by: got 'colour'; must be some of tenant, key, day, model, kind"):
        used("usage", "--by", "tenant,colour")
    with pytest.raises(InvalidInput, match="since: got 'yesterday'; must be a day"):
        used("usage", "--since", "yesterday")
    with pytest.raises(NotFound, match="carol"):
        used("usage", "--tenant", "carol")
