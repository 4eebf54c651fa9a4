"""The calling API key: whose it is, a token in its place, its end."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from tuft.api.auth import CallingKey, Served
from tuft.service.tenants import ORGANIZATION

router = APIRouter(tags=["account"])


@router.get("/auth/apikey/me")
async def show_own_key(key: CallingKey) -> dict[str, Any]:
    """For ``tinker auth login``. Tenants have no email address; their name stands where one would."""
    return {
        "key_id": key.number,
        "name": " ".join(part for part in (key.tenant.name, key.name, f"…{key.hint}") if part),
        "note": "given by the server's configuration" if key.created_at is None else "made by `tuft key create`",
        "scopes": key.scopes,
        "expires_at": key.expires_at,
        "details": {"org_details": {"name": ORGANIZATION}, "user_details": {"email": key.tenant.name}},
    }


@router.delete("/auth/apikey/me", status_code=204)
async def revoke_own_key(key: CallingKey, services: Served) -> Response:
    services.tenants.revoke(key, by=key)
    return Response(status_code=204)


@router.post("/auth/token")
async def exchange_for_token(key: CallingKey, services: Served) -> dict[str, str]:
    """A JWT, which the SDK sends in place of the key from then on and reads its identity from."""
    return {"jwt": services.tenants.token(key)}
