"""What a tenant has here: runs, checkpoints, sessions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from tuft.api.auth import Caller, Served
from tuft.api.body import Fields, parse, read_body
from tuft.api.wire import NOT_SUPPORTED
from tuft.errors import InvalidInput
from tuft.records import Checkpoint, Run, Tenant
from tuft.service.services import Services

router = APIRouter(tags=["rest"])

Limit = Annotated[int, Query(ge=1, le=10_000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]


class WeightsInfo(Fields):
    tinker_path: str


@router.get("/training_runs")
async def list_runs(
    tenant: Caller, services: Served, limit: Limit = 20, offset: Offset = 0, project_id: str | None = None
) -> dict[str, Any]:
    if project_id is not None:
        raise InvalidInput("project_id", project_id, NOT_SUPPORTED)
    runs, total_count = services.runs.list(tenant, limit, offset)
    return {
        "training_runs": [_run(services, tenant, run) for run in runs],
        "cursor": _cursor(limit, offset, total_count),
    }


@router.get("/training_runs/{run_id}")
async def get_run(run_id: str, tenant: Caller, services: Served) -> dict[str, Any]:
    return _run(services, tenant, services.runs.get(tenant, run_id))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(
    run_id: str, tenant: Caller, services: Served, limit: Limit = 10_000, offset: Offset = 0
) -> dict[str, Any]:
    run = services.runs.get(tenant, run_id)
    checkpoints, total_count = services.checkpoints.list(tenant, run.run_id, limit, offset)
    return {
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in checkpoints],
        "cursor": _cursor(limit, offset, total_count),
    }


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
async def delete_checkpoint(run_id: str, kind: str, name: str, tenant: Caller, services: Served) -> Response:
    services.checkpoints.delete(tenant, f"tinker://{run_id}/{kind}/{name}")
    return Response(status_code=204)


@router.get("/checkpoints")
async def list_checkpoints(tenant: Caller, services: Served, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    checkpoints, total_count = services.checkpoints.list(tenant, None, limit, offset)
    return {
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in checkpoints],
        "cursor": _cursor(limit, offset, total_count),
    }


@router.post("/weights_info")
async def weights_info(request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """What a client must know to create a run that the checkpoint fits."""
    checkpoint = services.checkpoints.get(tenant, parse(WeightsInfo, await read_body(request)).tinker_path)
    spec = checkpoint.spec
    return {
        "base_model": checkpoint.base_model,
        "is_lora": True,
        "lora_rank": spec.rank,
        "train_unembed": spec.train_unembed,
        "train_mlp": spec.train_mlp,
        "train_attn": spec.train_attn,
        "optimizer_config": {"type": "adamw"},
    }


@router.get("/sessions")
async def list_sessions(tenant: Caller, services: Served, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
    sessions, _ = services.sessions.list(tenant, limit, offset)
    return {"sessions": [session.session_id for session in sessions]}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, tenant: Caller, services: Served) -> dict[str, Any]:
    session, run_ids, sampler_ids = services.sessions.get(tenant, session_id)
    return {
        "training_run_ids": run_ids,
        "sampler_ids": sampler_ids,
        "user_metadata": dict(session.user_metadata),
        "display_name": session.display_name,
    }


def _cursor(limit: int, offset: int, total_count: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total_count}


def _run(services: Services, tenant: Tenant, run: Run) -> dict[str, Any]:
    training, sampler = services.checkpoints.last(tenant, run.run_id)
    return {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": tenant.name,
        "is_lora": True,
        "corrupted": run.corrupted,
        "lora_rank": run.spec.rank,
        "last_request_time": run.last_request_at,
        "last_checkpoint": None if training is None else _checkpoint(training),
        "last_sampler_checkpoint": None if sampler is None else _checkpoint(sampler),
        "user_metadata": dict(run.user_metadata),
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": checkpoint.path.checkpoint_id,
        "checkpoint_type": checkpoint.path.kind,
        "time": checkpoint.created_at,
        "tinker_path": str(checkpoint.path),
        "size_bytes": checkpoint.size_bytes,
        "public": False,
        "user_metadata": dict(checkpoint.user_metadata),
        "expires_at": checkpoint.expires_at,
    }
