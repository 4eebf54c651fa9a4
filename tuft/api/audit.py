"""The audit log."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from tuft.api.auth import Caller, Served
from tuft.api.pages import listed
from tuft.records import AuditEntry, now

router = APIRouter(tags=["audit"])

EventType = Annotated[Literal["all", "checkpoints", "projects", "teams", "organizations"], Query()]
_DEPRECATED = ("model_id", "tinker_path", "purpose")


@router.get("/audit")
async def audit_log(tenant: Caller, services: Served, event_type: EventType = "all", day: date | None = None) -> Any:
    """What the caller did, and what others did with what is the caller's, on one day from midnight to midnight UTC."""
    entries = await services.audit.of_day(tenant, event_type, day or now().date())
    return await listed(len(entries), lambda: {"entries": [entry_json(entry) for entry in entries]})


def entry_json(entry: AuditEntry) -> dict[str, Any]:
    shown = {"timestamp": entry.at, "event": entry.event, "event_details": dict(entry.details)}
    if entry.event.startswith("checkpoint_"):
        shown |= {field: entry.details.get(field) for field in _DEPRECATED}
    return shown
