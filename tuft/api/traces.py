"""A session as a timeline, for ui.perfetto.dev."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tuft.api.auth import Caller, Served

router = APIRouter(tags=["traces"])


@router.get("/sessions/{session_id}/trace_export")
async def export_trace(session_id: str, request: Request, tenant: Caller, services: Served) -> dict[str, Any]:
    """The link to the trace, good for an hour. It is made when it is fetched, so that it is always ready."""
    session = services.sessions.find(tenant, session_id, accessible=True)
    signature, expires_at_s = services.traces.link(session.session_id)
    url = request.url_for("fetch_trace", session_id=session.session_id)
    return {"status": "ready", "url": str(url.include_query_params(expires=expires_at_s, signature=signature))}


@router.get("/traces/{session_id}")
async def fetch_trace(session_id: str, expires: int, signature: str, services: Served) -> Response:
    """Whoever has the link has the trace."""
    services.traces.check_link(session_id, signature, expires)
    content = await services.traces.export(services.sessions.signed_for(session_id))
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.pftrace"'}
    return Response(content, media_type="application/json", headers=headers)
