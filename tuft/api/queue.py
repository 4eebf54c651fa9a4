"""What of the caller's waits, why, and for how long."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from tuft.api.auth import Caller, Served

router = APIRouter(tags=["queue"])

_MAX_SHOWN = 1000


@router.get("/queue")
async def show_queue(
    tenant: Caller, services: Served, limit: Annotated[int, Query(ge=0, le=_MAX_SHOWN)] = 100
) -> dict[str, Any]:
    """The caller's pending requests in the order in which they were accepted, at most ``limit``: each with its state,
    its place in the fair order, and about how many seconds its result will take. And the load of the whole server."""
    waiting = await services.futures.waiting(tenant, limit)
    return {
        "load": asdict(services.waits.load()),
        "num_waiting": services.futures.num_waiting(tenant),
        "waiting": [
            {
                "request_id": future_id,
                "kind": key.kind,
                "of": key.subject_id,
                "seq": key.seq,
                "state": pending.state,
                "reason": pending.reason,
                "position": pending.position,
                "eta_s": pending.eta_s,
            }
            for future_id, key, pending in waiting
        ],
    }
