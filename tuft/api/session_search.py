"""Finding sessions, and looking into them."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import AwareDatetime, Field

from tuft.api.auth import Caller, Served
from tuft.api.body import Fields, JsonBody, utc
from tuft.api.pages import Limit, Offset, Scope
from tuft.api.refusals import note_refusal
from tuft.config import DEFAULT_PROJECT
from tuft.errors import InvalidInput
from tuft.records import URN_PREFIX, SessionSearch, SessionSummary, StatusFilter, Tenant

router = APIRouter(tags=["sessions"])


class SearchOwner(Fields):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: tuple[str, ...] = Field((), max_length=10, fail_fast=True)


class StatusQuery(Fields):
    """No session is ever ``cancelled``: there is nothing here that does it."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: tuple[str, ...] | None = Field(None, min_length=1, max_length=10, fail_fast=True)


class SearchCursor(Fields):
    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessions(Fields):
    """As the SDK's SessionSearchRequest."""

    session_id: str | None = None
    project_ids: tuple[str, ...] | None = Field(None, max_length=200, fail_fast=True)
    user_metadata: dict[str, str] = Field({}, max_length=50)
    display_name: str | None = Field(None, min_length=1, max_length=1000)
    owner: SearchOwner = SearchOwner()
    statuses: tuple[StatusQuery, ...] | None = Field(None, min_length=1, max_length=10, fail_fast=True)
    limit: int = Field(50, ge=1, le=200)
    cursor: SearchCursor | None = None


@router.get("/sessions")
async def list_sessions(
    tenant: Caller, services: Served, limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned"
) -> dict[str, Any]:
    sessions, _ = services.sessions.list(tenant, limit, offset, access_scope == "accessible")
    return {"sessions": [session.session_id for session in sessions]}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str, tenant: Caller, services: Served, access_scope: Scope = "owned"
) -> dict[str, Any]:
    session = services.sessions.find(tenant, session_id, access_scope == "accessible")
    run_ids, sampler_ids = services.sessions.parts(session)
    return {
        "training_run_ids": run_ids,
        "sampler_ids": sampler_ids,
        "user_metadata": dict(session.user_metadata),
        "display_name": session.display_name,
    }


@router.post("/sessions/search")
async def search_sessions(
    body: JsonBody[SearchSessions], request: Request, tenant: Caller, services: Served
) -> dict[str, Any]:
    after = None
    if body.cursor is not None:
        after = (utc(body.cursor.last_created_at, "cursor.last_created_at"), body.cursor.last_session_id)
    search = SessionSearch(
        session_id=body.session_id,
        name_words=_words(body.display_name),
        project_ids=body.project_ids,
        user_metadata=body.user_metadata,
        owners=_owners(body.owner, tenant),
        statuses=_statuses(body.statuses),
        limit=body.limit,
        after=after,
    )
    found, more = await services.sessions.search(tenant, search)
    if body.session_id is not None:
        note_refusal(request, services.sessions.missing(tenant, body.session_id))
    cursor = None if more is None else {"last_created_at": more[0], "last_session_id": more[1]}
    return {"sessions": [_summary(summary) for summary in found], "next_cursor": cursor}


def _words(display_name: str | None) -> tuple[str, ...]:
    words = tuple((display_name or "").split())
    if display_name is not None and not 1 <= len(words) <= 50:
        raise InvalidInput("display_name", display_name, "must hold 1 to 50 words")
    return words


def _statuses(queries: tuple[StatusQuery, ...] | None) -> tuple[StatusFilter, ...] | None:
    return None if queries is None else tuple(StatusFilter(query.type, query.reasons) for query in queries)


def _owners(owner: SearchOwner, caller: Tenant) -> tuple[str, ...] | None:
    if owner.type == "accessible":
        return None
    urns = owner.owner_urns if owner.type == "user" else (caller.urn,)
    for urn in urns:
        if not urn.startswith(URN_PREFIX):
            raise InvalidInput("owner.owner_urns", urn, f"must read {URN_PREFIX}<name>")
    if not urns:
        raise InvalidInput("owner.owner_urns", [], "name 1 to 10 owners")
    return tuple(urn.removeprefix(URN_PREFIX) for urn in urns)


def _summary(summary: SessionSummary) -> dict[str, Any]:
    session = summary.session
    return {
        "session_id": session.session_id,
        "created_at": session.created_at,
        "owner": summary.owner.urn,
        "project_id": session.project_id or DEFAULT_PROJECT,
        "status": _status(summary),
        "checkpoints_count": summary.num_checkpoints,
        "display_name": session.display_name,
        "user_metadata": dict(session.user_metadata),
        "checkpoint_storage_bytes": summary.checkpoint_bytes,
    }


def _status(summary: SessionSummary) -> dict[str, Any] | None:
    session = summary.session
    if summary.status == "client_finished":
        return {"type": "client_finished", "reason": {"type": session.finish_reason}, "detail": session.finish_detail}
    if summary.status == "failed" and summary.failed_run is not None:
        run_id, run_status = summary.failed_run
        why = "was lost when the engine or the server ended" if run_status == "lost" else "could not begin"
        return {
            "type": "failed",
            "category": "internal",
            "reason": {"type": "training_run", "training_run_id": run_id},
            "message": f"run {run_id} {why}",
        }
    return None if summary.status is None else {"type": summary.status}
