"""What is told of tenants and their keys, by the admin API and the command line alike."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from tuft.records import ApiKey, TenantSummary, now

Facts = Mapping[str, str | int | list[str] | datetime | None]


def tenant_facts(summary: TenantSummary) -> Facts:
    return {
        "tenant_id": summary.tenant.tenant_id,
        "name": summary.tenant.name,
        "created_at": summary.created_at,
        "suspended_at": summary.suspended_at,
        "num_keys": summary.num_keys,
    }


def key_facts(key: ApiKey) -> Facts:
    """Nothing that opens a door: neither the key nor the hash that stands for it in tokens."""
    return {
        "key_id": key.number,
        "tenant": key.tenant.name,
        "name": key.name,
        "hint": f"…{key.hint}",
        "scopes": list(key.scopes),
        "state": key.state(now()),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }
