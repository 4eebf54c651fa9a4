"""What may be asked of checkpoints beside saving and loading them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from tuft.api.auth import Caller, Served
from tuft.api.body import ClientSeq, Fields, JsonBody
from tuft.api.optimizers import config_json
from tuft.api.pages import Limit, Offset, cursor, listed
from tuft.errors import InvalidInput
from tuft.records import Checkpoint
from tuft.types import CheckpointKind

router = APIRouter(tags=["checkpoints"])

OF_RUN = "/training_runs/{run_id}/checkpoints"
ONE = OF_RUN + "/{kind}/{name}"


_EXTERNAL_SINCE = (0, 28)
_SDK = re.compile(r"Tinker/Python (\d+)\.(\d+)")


async def _known_kinds(request: Request) -> tuple[CheckpointKind, ...]:
    """The kinds that the caller's SDK can read: one that is older than a kind fails at a list that has it."""
    sdk = _SDK.search(request.headers.get("user-agent", ""))
    if sdk is not None and (int(sdk[1]), int(sdk[2])) < _EXTERNAL_SINCE:
        return "training", "sampler"
    return "training", "sampler", "external"


KnownKinds = Annotated[tuple[CheckpointKind, ...], Depends(_known_kinds)]


class WeightsInfo(Fields):
    tinker_path: str


class SetTtl(Fields):
    ttl_seconds: int | None


class CopyWeights(Fields):
    source_path: str
    session_id: str | None = None
    model_seq_id: ClientSeq | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


@router.get(OF_RUN)
@router.get("/models/{run_id}/checkpoints")  # SDKs up to 0.3
async def list_run_checkpoints(
    run_id: str,
    tenant: Caller,
    services: Served,
    kinds: KnownKinds,
    limit: Limit = 10_000,
    offset: Offset = 0,
) -> Any:
    run = services.runs.find(tenant, run_id, accessible=True)
    checkpoints, total_count = await services.checkpoints.list(run.tenant_id, run_id, kinds, limit, offset)
    return await listed(
        len(checkpoints),
        lambda: {"checkpoints": list(map(shown, checkpoints)), "cursor": cursor(limit, offset, total_count)},
    )


@router.get("/checkpoints")
async def list_checkpoints(
    tenant: Caller, services: Served, kinds: KnownKinds, limit: Limit = 100, offset: Offset = 0
) -> Any:
    checkpoints, total_count = await services.checkpoints.list(tenant.tenant_id, None, kinds, limit, offset)
    return await listed(
        len(checkpoints),
        lambda: {"checkpoints": list(map(shown, checkpoints)), "cursor": cursor(limit, offset, total_count)},
    )


@router.delete(ONE, status_code=204)
async def delete_checkpoint(run_id: str, kind: str, name: str, tenant: Caller, services: Served) -> Response:
    services.checkpoints.delete(tenant, path_of(run_id, kind, name))
    return Response(status_code=204)


@router.post(ONE + "/publish", status_code=204)
async def publish_checkpoint(run_id: str, kind: str, name: str, tenant: Caller, services: Served) -> Response:
    """Every tenant may read it from now on, and its owner alone change it. Done again it changes nothing: the SDK takes
    a conflict for a reason to try for minutes."""
    services.checkpoints.set_public(tenant, path_of(run_id, kind, name), True)
    return Response(status_code=204)


@router.delete(ONE + "/publish", status_code=204)
async def unpublish_checkpoint(run_id: str, kind: str, name: str, tenant: Caller, services: Served) -> Response:
    services.checkpoints.set_public(tenant, path_of(run_id, kind, name), False)
    return Response(status_code=204)


@router.put(ONE + "/ttl", status_code=204)
async def set_checkpoint_ttl(
    run_id: str, kind: str, name: str, body: JsonBody[SetTtl], tenant: Caller, services: Served
) -> Response:
    services.checkpoints.set_ttl(tenant, path_of(run_id, kind, name), body.ttl_seconds)
    return Response(status_code=204)


@router.post("/weights_info")
async def weights_info(body: JsonBody[WeightsInfo], tenant: Caller, services: Served) -> dict[str, Any]:
    """What a client must know to create a run that the checkpoint fits."""
    checkpoint = services.checkpoints.get(tenant, body.tinker_path)
    spec = checkpoint.spec
    return {
        "base_model": checkpoint.base_model,
        "is_lora": True,
        "lora_rank": spec.rank,
        "train_unembed": spec.train_unembed,
        "train_mlp": spec.train_mlp,
        "train_attn": spec.train_attn,
        "optimizer_config": config_json(checkpoint.optimizer),
    }


@router.post("/copy_weights")
async def copy_weights(
    body: JsonBody[CopyWeights], request: Request, tenant: Caller, services: Served
) -> dict[str, Any]:
    """Into a project, or into a slot of a session."""
    token = request.headers.get("x-tinker-weights-access-token", body.weights_access_token)
    slot = (body.session_id, body.model_seq_id)
    if (body.destination_project_id is None) == (slot == (None, None)):
        allowed = "give it, or session_id and model_seq_id, and not both"
        raise InvalidInput("destination_project_id", body.destination_project_id, allowed)
    if body.destination_project_id is not None:
        key = request.headers.get("x-idempotency-key")
        path = services.copies.copy_into_project(
            tenant, body.source_path, body.destination_project_id, body.ttl_seconds, token, key
        )
        return {"tinker_path": path}
    for field, value in zip(("session_id", "model_seq_id"), slot, strict=True):
        if value is None:
            raise InvalidInput(field, None, "is required where the other is given")
    assert body.session_id is not None
    assert body.model_seq_id is not None
    path = services.copies.copy(tenant, body.source_path, body.session_id, body.model_seq_id, body.ttl_seconds, token)
    return {"tinker_path": path}


def path_of(run_id: str, kind: str, name: str) -> str:
    """A checkpoint's id holds a slash (``weights/x``), and so fills two segments of the routes' paths."""
    return f"tinker://{run_id}/{kind}/{name}"


def shown(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint as lists show it."""
    return {
        "checkpoint_id": checkpoint.path.checkpoint_id,
        "checkpoint_type": checkpoint.path.kind,
        "time": checkpoint.created_at,
        "tinker_path": str(checkpoint.path),
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": dict(checkpoint.user_metadata),
        "expires_at": checkpoint.expires_at,
    }
