"""What was refused because nothing of that id is the caller's: ``service.ownership`` is told, with who called what."""

from __future__ import annotations

from fastapi import Request

from tuft.errors import TuftError
from tuft.records import Tenant
from tuft.service.services import Services


def note_refusal(request: Request, error: TuftError | None) -> None:
    """Every error passes here on its way out; most refuse no id."""
    if error is None or error.refused is None:
        return
    services: Services = request.app.state.services
    caller: Tenant | None = getattr(request.state, "caller", None)  # set by ``auth``; nobody's on public routes
    action = f"{request.method} {request.scope['route'].path_format}"
    services.ownership.refused(error.refused, action, None if caller is None else caller.tenant_id)
