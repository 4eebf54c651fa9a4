"""`tuft quota`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Tuft
from tuft.app import open_store
from tuft.config import load_config
from tuft.errors import InvalidInput, NotFound
from tuft.service.services import open_tenants


def allowed(tuft: Tuft) -> dict[tuple[str, int, str], float | None]:
    rows = json.loads(tuft("quota", "list", "--json"))
    return {(row["tenant"], row["key"], row["quota"]): row["allowed"] for row in rows}


def test_what_is_set_is_listed_beside_what_the_configuration_says(tuft: Tuft) -> None:
    tuft("tenant", "create", "alice")
    tuft("quota", "set", "--tenant", "alice", "--tokens-per-day", "1e6", "--spend-total", "none")
    listed = allowed(tuft)
    assert listed["alice", 0, "tokens_per_day"] == 1e6
    assert listed["alice", 0, "spend_total"] is None
    assert listed["(everyone)", 0, "concurrent_runs"] == 64
    assert "1,000,000" in tuft("quota", "list")
    tuft("quota", "set", "--tenant", "alice", "--tokens-per-day", "default", "--requests-per-s", "0.5")
    listed = allowed(tuft)
    assert ("alice", 0, "tokens_per_day") not in listed
    assert listed["alice", 0, "requests_per_s"] == 0.5
    assert listed["alice", 0, "spend_total"] is None


def test_a_key_of_theirs_may_have_less_and_only_theirs(tuft: Tuft) -> None:
    for name in ("alice", "bob"):
        tuft("key", "create", "--tenant", name)
    number = next(key["key_id"] for key in json.loads(tuft("key", "list", "--json")) if key["tenant"] == "alice")
    tuft("quota", "set", "--tenant", "alice", "--key", str(number), "--stored-bytes", "1e9")
    assert allowed(tuft)["alice", number, "stored_bytes"] == 1e9
    with pytest.raises(NotFound, match="is none of tenant bob"):
        tuft("quota", "set", "--tenant", "bob", "--key", str(number), "--stored-bytes", "1")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much", ""])
def test_a_value_that_means_nothing_is_refused(tuft: Tuft, value: str) -> None:
    tuft("tenant", "create", "alice")
    with pytest.raises(InvalidInput, match="tokens_per_day: .* must be a number from 0 on"):
        tuft("quota", "set", "--tenant", "alice", "--tokens-per-day", value)


def test_a_tenant_that_is_unknown_and_a_quota_that_is_not_named_are_refused(tuft: Tuft) -> None:
    with pytest.raises(InvalidInput, match="give at least one"):
        tuft("quota", "set", "--tenant", "alice")
    with pytest.raises(NotFound, match="alice"):
        tuft("quota", "set", "--tenant", "alice", "--spend-total", "1")


async def test_who_set_what_stands_in_the_audit_log_of_the_tenant(tuft: Tuft, tmp_path: Path) -> None:
    tuft("tenant", "create", "alice")
    tuft("quota", "set", "--tenant", "alice", "--spend-per-day", "2.5")
    config = load_config(home=tmp_path)
    database = open_store(config)
    try:
        from tuft.records import now
        from tuft.service.audit import Audit
        from tuft.store.audit import AuditLog

        tenant = open_tenants(config, database).named("alice")
        entries = await Audit(AuditLog(database), 90).of_day(tenant, "organizations", now().date())
    finally:
        database.close()
    (entry,) = [entry for entry in entries if entry.event == "tenant_quota_set"]
    assert entry.details["spend_per_day"] == "2.5"
    assert str(entry.details["actor"]).startswith("urn:tuft:operator:")
