"""Who calls: every route takes its tenant from the API key here, or is on the short list of public ones.

The dependencies are ``async`` though they await nothing: FastAPI runs others in threads, four hops a request.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from tuft.api.scopes import API_PREFIX, scope_of
from tuft.records import ApiKey, Tenant
from tuft.service.services import Services

_UNCOUNTED = frozenset(
    f"{API_PREFIX}/{name}" for name in ("retrieve_future", "retrieve_futures", "session_heartbeat", "telemetry")
)
"""Those that only wait for results or keep a session alive: to refuse them would but make their client ask again."""


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def key_of(request: Request) -> ApiKey:
    """The API key in ``X-API-Key`` or ``Authorization: Bearer``, or the one whose token is there; it has the scope that
    the route needs. Raises Unauthorized, Forbidden or, if it asks too often, QuotaExceeded."""
    credential = request.headers.get("x-api-key")
    if credential is None:
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        credential = credentials.strip() if scheme.lower() == "bearer" else None
    services: Services = request.app.state.services
    key = services.tenants.key(credential)
    request.state.caller = key.caller
    path = API_PREFIX + str(request.scope["route"].path_format).removeprefix(API_PREFIX)  # older FastAPIs have it there
    needed = scope_of(request.method, path)
    if needed is not None:
        services.tenants.require(key, needed, f"{request.method} {path}")
    if path not in _UNCOUNTED:
        services.quotas.admit(key.caller)
    return key


CallingKey = Annotated[ApiKey, Depends(key_of)]


async def tenant_of(key: CallingKey) -> Tenant:
    return key.caller


Served = Annotated[Services, Depends(services_of)]
Caller = Annotated[Tenant, Depends(tenant_of)]
