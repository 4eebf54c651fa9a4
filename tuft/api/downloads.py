"""Links to checkpoints' files, and the one route that serves them: to whoever has the link, without a key."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from tuft.api.auth import Caller, Served
from tuft.api.checkpoints import ONE, path_of
from tuft.records import CheckpointPath
from tuft.service.downloads import Download, Link

router = APIRouter(tags=["downloads"])


@router.get(ONE + "/external_weights_urls")
async def external_weights_urls(
    run_id: str, kind: str, name: str, request: Request, tenant: Caller, services: Served
) -> dict[str, Any]:
    links = await services.downloads.links(tenant, path_of(run_id, kind, name))
    expires_at_s = min(link.expires_at_s for link in links)
    urls = {link.file: _url(request, link) for link in links}
    return {"urls": urls, "expires": datetime.fromtimestamp(expires_at_s, UTC)}


@router.get(ONE + "/archive", status_code=302, response_class=Response)
async def checkpoint_archive(
    run_id: str, kind: str, name: str, request: Request, tenant: Caller, services: Served
) -> Response:
    """A redirect to a tar of the checkpoint, which SDKs up to 0.35 fetch without their key."""
    link = await services.downloads.archive(tenant, path_of(run_id, kind, name))
    expires = format_datetime(datetime.fromtimestamp(link.expires_at_s, UTC), usegmt=True)
    return Response(status_code=302, headers={"Location": _url(request, link), "Expires": expires})


@router.get("/download/{run_id}/{kind}/{name}/{file}", response_class=Response)
async def download(
    run_id: str,
    kind: str,
    name: str,
    file: str,
    services: Served,
    expires: Annotated[int, Query(ge=0, lt=2**53)],
    signature: str,
) -> Response:
    """What a link leads to."""
    path = CheckpointPath.parse(path_of(run_id, kind, name))
    download = await services.downloads.follow(Link(path, file, expires, signature))
    content = download.content
    if isinstance(content, Path):
        return _Held(FileResponse(content, media_type="application/octet-stream", filename=file), download)
    headers = {
        "Content-Length": str(content.size_bytes),
        "Content-Disposition": f'attachment; filename="{name}.tar"',
    }
    response = StreamingResponse(content.parts(), media_type="application/x-tar", headers=headers)
    return _Held(response, download)


class _Held(Response):
    """Sends another response, and then lets go of the files that it was made from."""

    def __init__(self, response: Response, download: Download) -> None:
        super().__init__()
        self._response = response
        self._download = download

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._download.held:
            await self._response(scope, receive, send)


def _url(request: Request, link: Link) -> str:
    """The link as whoever asked can follow it: they reach the server by the name that they have just used."""
    headers = request.headers
    scheme = headers.get("x-forwarded-proto", request.url.scheme)
    host = headers.get("x-forwarded-host", headers.get("host", ""))
    prefix = headers.get("x-forwarded-prefix", "").rstrip("/")
    route = request.url.path.partition("/training_runs/")[0]
    parts = (link.path.run_id, *link.path.checkpoint_id.split("/"), link.file)
    query = urlencode({"expires": link.expires_at_s, "signature": link.signature})
    return f"{scheme}://{host}{prefix}{route}/download/{'/'.join(quote(part, safe=':') for part in parts)}?{query}"
