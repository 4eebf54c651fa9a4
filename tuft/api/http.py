"""The HTTP application: its routes, and the one place where an error becomes a status.

The SDK acts on the status alone: 408 and 5xx it retries, 410 means that a future is lost, other 4xx end the call. Every
error body is ``{"detail": str}`` and has a content length, without which the SDK takes a 400 for a broken network.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tuft import __version__
from tuft.api import (
    account,
    admin,
    audit,
    checkpoints,
    custom_losses,
    downloads,
    futures,
    hub,
    queue,
    runs,
    sampling,
    session_search,
    sessions,
    traces,
    training,
    usage,
)
from tuft.api.body import invalid_input
from tuft.api.document import DocumentedApp, Routers
from tuft.api.inflight import InFlight
from tuft.api.quotas import quota_answer
from tuft.api.refusals import note_refusal
from tuft.api.scopes import API_PREFIX
from tuft.errors import (
    Damaged,
    EngineDied,
    Forbidden,
    Gone,
    InvalidToken,
    ModelError,
    NotFound,
    Overloaded,
    QuotaExceeded,
    StorageError,
    TooLarge,
    TuftError,
    Unauthorized,
    UserError,
)
from tuft.service.services import Services
from tuft.turns import Turns

log = structlog.get_logger(__name__)

_STATUSES: dict[type[TuftError], int] = {
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    Gone: 410,
    TooLarge: 413,
    QuotaExceeded: 429,
    UserError: 400,
    ModelError: 503,
    EngineDied: 503,
    Overloaded: 503,
    Damaged: 422,
    StorageError: 503,
    TuftError: 500,
}
_MAX_RETRY_AFTER_S = 20
_ANSWERED_AT_ONCE = 4
"""Of the clients who wait for results, in one round of the event loop."""

_PARTS = (
    account,
    sessions,
    session_search,
    training,
    custom_losses,
    sampling,
    futures,
    queue,
    runs,
    checkpoints,
    downloads,
    usage,
    audit,
    admin,
    traces,
)

probes = APIRouter(tags=["probes"])
ROUTERS: Routers = (("", probes), *((API_PREFIX, part.router) for part in _PARTS), ("", hub.router))


def create_app(services: Services) -> FastAPI:
    """The application on ``services``, which must have been started on the event loop that serves it."""
    app = DocumentedApp(ROUTERS, title="TuFT", version=__version__, redoc_url=None)
    app.state.services = services
    app.state.turns = Turns(_ANSWERED_AT_ONCE)
    app.state.inflight = InFlight(services.config.limits.max_inflight_bytes)
    app.state.started_at_s = time.monotonic()
    app.add_exception_handler(TuftError, _tuft_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
    app.add_exception_handler(Exception, _bug)
    return app


@probes.get("/")
async def about() -> dict[str, str]:
    return {"name": "TuFT", "version": __version__, "api": API_PREFIX, "docs": "/docs", "ready": "/readyz"}


@probes.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 only while the base models can compute."""
    services: Services = request.app.state.services
    models = [model.name for model in services.base_models]
    if not models:
        return _error(503, "the base models are still loading")
    return JSONResponse({"status": "ready", "base_models": models})


@probes.get(f"{API_PREFIX}/healthz")
async def healthz() -> dict[str, str]:
    """The process answers; whether it can compute is readyz."""
    return {"status": "ok"}


def status_of(error: TuftError) -> int:
    return next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)


async def _tuft_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TuftError)
    note_refusal(request, error)
    status = status_of(error)
    if status == 500 or isinstance(error, StorageError):
        log.error("request failed", path=request.url.path, error=str(error), kind=type(error).__name__)
    headers = {}
    if isinstance(error, ModelError):
        headers["Retry-After"] = str(_retry_after_s(request))
    if isinstance(error, (Overloaded, StorageError)):
        headers["Retry-After"] = "1"
    if isinstance(error, QuotaExceeded):
        status, headers = quota_answer(error, request.headers.get("user-agent", ""))
    if isinstance(error, Unauthorized):  # the SDK makes a new token when this one is said to be what is wrong
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if isinstance(error, InvalidToken) else "Bearer"
    return _error(status, error.told, headers)


def _retry_after_s(request: Request) -> int:
    """About half as long as the server has been loading: the SDK's ten retries then outlast small models and large."""
    up_s = time.monotonic() - float(request.app.state.started_at_s)
    return min(max(int(up_s / 2), 1), _MAX_RETRY_AFTER_S)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = f"this server does not know {request.method} {request.url.path}"
    return _error(error.status_code, detail, error.headers)


async def _wrong_parameter(_request: Request, error: Exception) -> Response:
    """A path or query parameter of the wrong shape."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    return _error(400, str(invalid_input({**problem, "loc": problem["loc"][1:]})))


async def _nobody_listens(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)


async def _bug(_request: Request, _cause: Exception) -> Response:
    """The server logs the traceback itself."""
    return _error(500, "internal error; the server's log says more")


def _error(status: int, detail: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code=status, headers=headers)
