"""How a client begins and ends: its configuration, its session, what this server can do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field, ValidationInfo, field_validator

from tuft.api.auth import Caller, Served
from tuft.api.body import Fields, JsonBody, Name, check_count, limits_of, texts
from tuft.errors import ModelError

router = APIRouter(tags=["sessions"])

CLIENT_CONFIG = {
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_write_fwdbwd": True,
    "proto_compress_fwdbwd": True,
    "sample_use_retrieve_futures": True,
    "sample_join_sampling_session": True,
    "custom_loss_server_side": True,
}
"""What the SDK may use of this server."""
_MAX_DETAIL = 10_000
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


class CreateSession(Fields):
    tags: tuple[str, ...] = Field((), fail_fast=True)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = Field("unknown", max_length=64)
    display_name: str | None = None
    project_id: Name | None = None

    @field_validator("tags")
    @classmethod
    def _are_few(cls, tags: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        check_count(tags, "tags", limits_of(info), "max_tags")
        return tags


class Heartbeat(Fields):
    session_id: str


class FinishReason(Fields):
    type: str = Field(max_length=32)


class AssignProject(Fields):
    project_id: Name


class Finish(Fields):
    long_texts = frozenset({"detail"})

    reason: FinishReason
    detail: str | None = None


@router.post("/client/config")
async def client_config(_: Caller, services: Served) -> dict[str, Any]:
    """The first call of every client since 0.18, which does without nothing."""
    config = services.config
    return {
        **CLIENT_CONFIG,
        "pjwt_auth_enabled": config.server.jwt_auth,
        "billing_exception_max_pause_duration_sec": round(config.quotas.pause_s),
    }


@router.post("/client/dynamic_config")
async def dynamic_config(_: Caller) -> dict[str, Any]:
    return DYNAMIC_CONFIG


@router.get("/get_server_capabilities")
async def get_server_capabilities(_: Caller, services: Served) -> dict[str, Any]:
    """Not before the models can compute: the SDK tries again on 503, so that a client may start before the server is
    ready."""
    if not services.base_models:
        raise ModelError("the base models are still loading; try again in a few seconds")
    models = [
        {
            "model_name": name,
            "max_context_length": model.max_context_tokens,
            "trainable": True,
            "sampleable": True,
        }
        for model in services.base_models
        for name in (model.name, *model.aliases)
    ]
    return {"supported_models": models}


@router.post("/create_session")
async def create_session(body: JsonBody[CreateSession], tenant: Caller, services: Served) -> dict[str, Any]:
    session = services.sessions.create(
        tenant,
        body.tags,
        texts(body.user_metadata, services.config.limits),
        body.sdk_version,
        body.display_name,
        body.project_id,
    )
    answer = {"type": "create_session", "session_id": session.session_id}
    if (warning := services.checkpoints.expiry_warning(tenant)) is not None:
        answer["warning_message"] = warning
    return answer


@router.post("/session_heartbeat")
async def session_heartbeat(body: JsonBody[Heartbeat], tenant: Caller, services: Served) -> dict[str, Any]:
    services.sessions.heartbeat(tenant, body.session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, body: JsonBody[Finish], tenant: Caller, services: Served) -> dict[str, Any]:
    detail = body.detail and body.detail[:_MAX_DETAIL]  # a traceback may be of any length, and the session is over
    services.sessions.finish(tenant, session_id, body.reason.type, detail)
    return {}


@router.put("/sessions/{session_id}/project", status_code=204)
async def assign_project(session_id: str, body: JsonBody[AssignProject], tenant: Caller, services: Served) -> Response:
    """Move the session, with its runs and samplers and their checkpoints, into a project."""
    services.sessions.assign(tenant, session_id, body.project_id)
    return Response(status_code=204)


@router.post("/telemetry")
async def telemetry(_: Caller) -> dict[str, Any]:
    """Accepted, since clients wait for the answer, and not kept: nothing here needs it."""
    return {"status": "accepted"}
