"""The runs that a tenant has here, or shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter

from tuft.api import checkpoints
from tuft.api.auth import Caller, Served
from tuft.api.pages import Limit, Offset, Scope, cursor, listed
from tuft.records import Run
from tuft.service.services import Services

router = APIRouter(tags=["runs"])


@router.get("/training_runs")
async def list_runs(
    tenant: Caller,
    services: Served,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: Scope = "owned",
    project_id: str | None = None,
) -> Any:
    if project_id is not None:
        services.projects.check(tenant, project_id)
    runs, total_count = services.runs.list(tenant, limit, offset, access_scope == "accessible", project_id)
    show = await _shown(services, runs)
    return await listed(
        len(runs), lambda: {"training_runs": list(map(show, runs)), "cursor": cursor(limit, offset, total_count)}
    )


@router.get("/training_runs/{run_id}")
async def get_run(run_id: str, tenant: Caller, services: Served, access_scope: Scope = "owned") -> dict[str, Any]:
    run = services.runs.find(tenant, run_id, access_scope == "accessible")
    show = await _shown(services, [run])
    return show(run)


async def _shown(services: Services, runs: Sequence[Run]) -> Callable[[Run], dict[str, Any]]:
    """What shows each of ``runs``, all that has to be looked up being known."""
    newest = await services.checkpoints.newest([run.run_id for run in runs])
    last = {key: checkpoints.shown(checkpoint) for key, checkpoint in newest.items()}
    owners = services.runs.owner_names(runs)

    def show(run: Run) -> dict[str, Any]:
        return {
            "training_run_id": run.run_id,
            "base_model": run.base_model,
            "model_owner": owners[run.tenant_id],
            "is_lora": True,
            "corrupted": run.corrupted,
            "lora_rank": run.spec.rank,
            "last_request_time": run.last_request_at,
            "last_checkpoint": last.get((run.run_id, "training")),
            "last_sampler_checkpoint": last.get((run.run_id, "sampler")),
            "user_metadata": dict(run.user_metadata),
        }

    return show
