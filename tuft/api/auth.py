"""Who calls: every route takes its tenant from the API key here, or is on the short list of public ones.

The dependencies are ``async`` though they await nothing: FastAPI runs others in threads, four hops a request.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from tuft.records import ApiKey, Tenant
from tuft.service.services import Services


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def key_of(request: Request) -> ApiKey:
    """The API key in ``X-API-Key`` or ``Authorization: Bearer``, or the one whose token is there. Raises
    Unauthorized."""
    key = request.headers.get("x-api-key")
    if key is None:
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        key = credentials.strip() if scheme.lower() == "bearer" else None
    services: Services = request.app.state.services
    return services.tenants.key(key)


CallingKey = Annotated[ApiKey, Depends(key_of)]


async def tenant_of(key: CallingKey) -> Tenant:
    return key.tenant


Served = Annotated[Services, Depends(services_of)]
Caller = Annotated[Tenant, Depends(tenant_of)]
