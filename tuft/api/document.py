"""The OpenAPI document. FastAPI describes what it parses itself; here the bodies join it, which ``body.Reader``s parse,
and the key that ``auth`` asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Response
from fastapi.dependencies.models import Dependant
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from tuft.api.auth import key_of
from tuft.api.body import Fields, Reader
from tuft.api.results import PROTOBUF

_KEYS = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "the key, or a JWT of /api/v1/auth/token"},
}
_DOCUMENT = "/openapi.json"
_REF = "#/components/schemas/{model}"

Routers = Sequence[tuple[str, APIRouter]]
"""Each with the prefix of its paths."""


class Refusal(BaseModel):
    """Says what was wrong: field, value seen, values allowed."""

    detail: str


class DocumentedApp(FastAPI):
    """An application that knows what its routes read."""

    def __init__(self, routers: Routers, **settings: Any) -> None:
        refused = {"model": Refusal, "description": "refused; a 408 has another body: the future is still pending"}
        absent = {"model": Refusal, "description": "the base models are still loading, or the engine has ended"}
        super().__init__(responses={"4XX": refused, 503: absent}, openapi_url=None, **settings)
        self._routers = routers
        self._encoded = b""
        self.add_api_route(_DOCUMENT, self._document, include_in_schema=False)
        self.add_api_route("/docs", self._page, include_in_schema=False)
        for prefix, router in routers:
            self.include_router(router, prefix=prefix)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _complete(super().openapi(), self._routers)
        assert self.openapi_schema is not None
        return self.openapi_schema

    async def _document(self) -> Response:
        """Encoded once: anyone may ask for it, and it takes milliseconds."""
        self._encoded = self._encoded or await asyncio.to_thread(lambda: orjson.dumps(self.openapi()))
        return Response(self._encoded, media_type="application/json")

    async def _page(self) -> Response:
        return get_swagger_ui_html(openapi_url=_DOCUMENT, title=self.title)


def readers(routers: Routers) -> Mapping[tuple[str, str], Reader[Any] | None]:
    """By path and method, what reads the body: None where nothing does."""
    return {
        (prefix + route.path_format, method): next(_readers(route.dependant), None)
        for prefix, route in _routes(routers)
        for method in route.methods or ()
    }


def _complete(document: dict[str, Any], routers: Routers) -> None:
    found = {place: reader for place, reader in readers(routers).items() if reader is not None}
    kinds = {kind for reader in found.values() for kind in _kinds(reader.model)}
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (kind, "validation") for kind in sorted(kinds, key=lambda kind: kind.__name__)
    ]
    refs, definitions = models_json_schema(wanted, ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **definitions["$defs"]}
    components["securitySchemes"] = _KEYS
    for (path, method), reader in found.items():
        shown = [refs[kind, "validation"] for kind in _kinds(reader.model)]
        content = {"application/json": {"schema": shown[0] if len(shown) == 1 else {"anyOf": shown}}}
        if reader.model.is_protobuf_too:
            content[PROTOBUF] = {"schema": {"type": "string", "format": "binary"}}
        document["paths"][path][method.lower()]["requestBody"] = {"required": True, "content": content}
    for prefix, route in _routes(routers):
        if key_of in _calls(route.dependant):
            for method in route.methods or ():
                operation = document["paths"][prefix + route.path_format][method.lower()]
                operation["security"] = [{name: []} for name in _KEYS]


def _kinds(model: type[Fields]) -> Sequence[type[Fields]]:
    return model.one_of or (model,)


def _routes(routers: Routers) -> Iterator[tuple[str, APIRoute]]:
    for prefix, router in routers:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            if route.include_in_schema:
                yield prefix, route


def _readers(dependant: Dependant) -> Iterator[Reader[Any]]:
    for call in _calls(dependant):
        reader = getattr(call, "__self__", None)  # of a bound method
        if isinstance(reader, Reader):
            yield reader


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any] | None]:
    yield dependant.call
    for dependency in dependant.dependencies:
        yield from _calls(dependency)
