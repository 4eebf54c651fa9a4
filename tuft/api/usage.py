"""What was used, by the hour, and what is stored, with what it cost. What has no price, or one that is not in US
dollars, costs null: the API's fields are named so."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from fastapi import APIRouter

from tuft.api.auth import Caller, Served
from tuft.api.body import utc
from tuft.api.pages import listed
from tuft.metering import GIGABYTE, UsageRow, price_of
from tuft.records import CheckpointStorage, Tenant

router = APIRouter(tags=["usage"])

_HOUR = timedelta(hours=1)
_CURRENCY = "USD"


@router.get("/billing/usage/events")
async def usage_events(tenant: Caller, services: Served, starting_on: datetime, ending_before: datetime) -> Any:
    """The caller's own usage between two full hours."""
    since, until = utc(starting_on, "starting_on"), utc(ending_before, "ending_before")
    await services.futures.writing.settled()
    rows = await services.usage.between(tenant, since, until)
    has_costs = services.prices.currency == _CURRENCY
    return await listed(
        len(rows),
        lambda: {
            "data": [_event(row, tenant, has_costs) for row in rows],
            "sessions": {row.session_id: {"user_metadata": row.user_metadata} for row in rows if row.session_id},
            "cost_data_through": None,
        },
    )


@router.get("/billing/usage/checkpoints/current")
async def checkpoint_storage(tenant: Caller, services: Served, project_id: str | None = None) -> dict[str, Any]:
    """Of the caller's checkpoints, and of those in the projects that the caller is a member of."""
    stored = services.usage.storage(tenant, project_id)
    rate = services.prices.rate("storage", "") if services.prices.currency == _CURRENCY else 0
    price = price_of(rate) if rate else None
    return {"effective_rate_usd_per_gigabyte_month": price, "data": [_stored(item, price) for item in stored]}


def _event(row: UsageRow, tenant: Tenant, has_costs: bool) -> dict[str, Any]:
    has_costs = has_costs and row.rate > 0
    price = price_of(row.rate) if has_costs else None
    is_storage = row.kind == "storage"
    return {
        "bucket_start": row.hour,
        "bucket_end": row.hour + _HOUR,
        "base_model": row.base_model,
        "user_id": tenant.urn,
        "user_name": tenant.name,
        "session_id": row.session_id,
        "project_id": row.project_id,
        "estimated_cost_usd": row.cost if has_costs else None,
        "effective_rate_usd_per_million_tokens": None if is_storage else price,
        "effective_rate_usd_per_gigabyte_month": price if is_storage else None,
        "event_info": _info(row),
    }


def _info(row: UsageRow) -> dict[str, Any]:
    match row.kind:
        case "storage":
            gigabyte_hours = row.quantity / GIGABYTE / _HOUR.total_seconds()
            return {"type": "storage", "free": False, "gigabyte_hours": gigabyte_hours}
        case "checkpoint":
            return {"type": "checkpoint", "count": row.quantity}
        case "prefill" | "prefill_cached":
            cached = row.kind == "prefill_cached"
            return {"type": "sampling_prefill", "cached": cached, "token_count": row.quantity}
        case "sample":
            return {"type": "sampling_sample", "token_count": row.quantity}
        case _:
            return {"type": "training", "token_count": row.quantity}


def _stored(item: CheckpointStorage, price: float | None) -> dict[str, Any]:
    gigabytes = item.num_bytes / GIGABYTE
    return {
        "project_id": item.project_id,
        "org_user_urn": item.owner.urn,
        "user_email": None,
        "user_name": item.owner.name,
        "checkpoint_count": item.num_checkpoints,
        "size_bytes": item.num_bytes,
        "size_gigabytes": gigabytes,
        "estimated_monthly_cost_usd": None if price is None else price * gigabytes,
    }
