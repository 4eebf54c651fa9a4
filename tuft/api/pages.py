"""Lists that come in pages, or are long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import Query, Response

_FEW = 200
Limit = Annotated[int, Query(ge=1, le=10_000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]
Scope = Literal["owned", "accessible"]
"""The caller's own, or those of the projects it shares too."""


def cursor(limit: int, offset: int, total_count: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total_count}


async def listed(num_items: int, build: Callable[[], dict[str, Any]]) -> Any:
    """What ``build`` makes of so many items. If they are many, it is made and encoded in a thread: thousands would hold
    everyone else's requests for a second."""
    if num_items <= _FEW:
        return build()
    return Response(await asyncio.to_thread(_encoded, build), media_type="application/json")


def _encoded(build: Callable[[], dict[str, Any]]) -> bytes:
    return orjson.dumps(build(), option=orjson.OPT_UTC_Z)
