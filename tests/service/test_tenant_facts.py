from __future__ import annotations

import json
from datetime import timedelta

from tuft.records import ApiKey, Tenant, TenantSummary, now
from tuft.service.tenant_facts import key_facts, tenant_facts

ALICE = Tenant("tenant-a", "alice")


def test_a_key_is_told_without_what_opens_the_door() -> None:
    key = ApiKey("ab" * 32, ALICE, "1234", now(), "laptop", ("read",), now() - timedelta(seconds=1))
    facts = key_facts(key)
    assert (facts["tenant"], facts["name"], facts["scopes"], facts["state"]) == ("alice", "laptop", ["read"], "expired")
    assert facts["key_id"] == key.number
    assert key.key_id not in json.dumps(facts, default=str)


def test_a_tenant_is_told_with_its_suspension() -> None:
    moment = now()
    facts = tenant_facts(TenantSummary(ALICE, moment, moment, 3))
    assert facts == {
        "tenant_id": "tenant-a",
        "name": "alice",
        "created_at": moment,
        "suspended_at": moment,
        "num_keys": 3,
    }
