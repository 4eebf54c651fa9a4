"""Tenants, keys and everyone's audit log: for keys of scope ``admin``. What `tuft tenant` and `tuft key` do on the
server's machine."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from pydantic import Field

from tuft.api.audit import EventType, entry_json
from tuft.api.auth import CallingKey, Served
from tuft.api.body import Fields, JsonBody
from tuft.api.pages import Limit, Offset, cursor
from tuft.config import USER_SCOPES, Scope
from tuft.records import now
from tuft.service.tenant_facts import key_facts, tenant_facts
from tuft.service.tenants import DEFAULT_GRACE_S

router = APIRouter(prefix="/admin", tags=["admin"])

KeyId = Annotated[int, Path(ge=0, lt=2**48)]


class CreateTenant(Fields):
    name: str


class CreateKey(Fields):
    tenant: str
    name: str = ""
    scopes: tuple[Scope, ...] = Field(USER_SCOPES, min_length=1, max_length=16, fail_fast=True)
    lifetime_s: float | None = None


class RotateKey(Fields):
    grace_s: float = DEFAULT_GRACE_S


@router.get("/tenants")
async def list_tenants(services: Served, _: CallingKey, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    tenants, total = services.tenants.tenants(limit, offset)
    return {"tenants": [tenant_facts(tenant) for tenant in tenants], "cursor": cursor(limit, offset, total)}


@router.post("/tenants", status_code=201)
async def create_tenant(body: JsonBody[CreateTenant], key: CallingKey, services: Served) -> dict[str, Any]:
    tenant = services.tenants.create_tenant(body.name, by=key)
    return {"tenant_id": tenant.tenant_id, "name": tenant.name}


@router.post("/tenants/{tenant_name}/suspend", status_code=204)
async def suspend_tenant(tenant_name: str, key: CallingKey, services: Served) -> Response:
    """Nobody is let in with the tenant's keys. What was accepted is computed, what was stored stays."""
    services.tenants.suspend(tenant_name, by=key)
    return Response(status_code=204)


@router.post("/tenants/{tenant_name}/resume", status_code=204)
async def resume_tenant(tenant_name: str, key: CallingKey, services: Served) -> Response:
    services.tenants.resume(tenant_name, by=key)
    return Response(status_code=204)


@router.get("/keys")
async def list_keys(
    services: Served, _: CallingKey, tenant: str | None = None, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """One tenant's keys or everyone's, those that ended too. ``configured`` are those that the configuration gives."""
    keys, total = services.tenants.keys(tenant, limit, offset)
    configured = [key for key in services.tenants.configured_keys if tenant in (None, key.tenant.name)]
    return {
        "keys": [key_facts(key) for key in keys],
        "configured": [key_facts(key) for key in configured],
        "cursor": cursor(limit, offset, total),
    }


@router.post("/keys", status_code=201)
async def create_key(body: JsonBody[CreateKey], key: CallingKey, services: Served) -> dict[str, Any]:
    """The key itself is in this answer and in no other. Its tenant must exist."""
    tenant = services.tenants.named(body.tenant)
    secret = services.tenants.create_key(tenant.name, body.name, body.scopes, body.lifetime_s, by=key)
    return {"key": secret, **key_facts(services.tenants.stored(secret))}


@router.delete("/keys/{key_id}", status_code=204)
async def revoke_key(key_id: KeyId, key: CallingKey, services: Served) -> Response:
    services.tenants.revoke(services.tenants.find_key(key_id), by=key)
    return Response(status_code=204)


@router.post("/keys/{key_id}/rotate", status_code=201)
async def rotate_key(key_id: KeyId, body: JsonBody[RotateKey], key: CallingKey, services: Served) -> dict[str, Any]:
    """A new key in its place, in this answer and in no other; the old one is good for ``grace_s`` more."""
    secret = services.tenants.rotate(services.tenants.find_key(key_id), body.grace_s, by=key)
    return {"key": secret, **key_facts(services.tenants.stored(secret))}


@router.get("/audit")
async def audit_log_of_all(
    services: Served,
    _: CallingKey,
    event_type: EventType = "all",
    day: date | None = None,
    tenant: str | None = None,
) -> dict[str, Any]:
    """One tenant's entries of a day (UTC) or everyone's. ``refused_since_start`` counts calls by why no key let them
    in."""
    of = None if tenant is None else services.tenants.named(tenant)
    entries = await services.audit.of_day(of, event_type, day or now().date(), for_operator=True)
    return {
        "entries": [{**entry_json(entry), "tenant": entry.tenant} for entry in entries],
        "refused_since_start": dict(services.tenants.num_refused),
    }
