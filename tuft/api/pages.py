"""Lists that come in pages."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

Limit = Annotated[int, Query(ge=1, le=10_000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]
Scope = Literal["owned", "accessible"]
"""The caller's own, or those of the projects it shares too."""


def cursor(limit: int, offset: int, total_count: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total_count}
