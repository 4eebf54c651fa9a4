from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import Response
from fastapi.encoders import jsonable_encoder

from tests.api.conftest import Served
from tuft.api import pages


async def test_a_long_list_reads_like_a_short_one() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 60_000, UTC)

    def build() -> dict[str, Any]:
        return {"items": [{"at": moment, "text": "é", "none": None, "number": 2**53, "list": (1, 2)}]}

    short = await pages.listed(1, build)
    long = await pages.listed(10_000, build)
    assert isinstance(long, Response)
    found = orjson.loads(long.body)
    assert found == {"items": [{**jsonable_encoder(short)["items"][0], "at": "2026-01-02T03:04:05.060000Z"}]}
    assert datetime.fromisoformat(found["items"][0]["at"]) == moment


def test_the_routes_of_long_lists_answer_alike(server: Served, monkeypatch: Any) -> None:
    routes = ("audit", "checkpoints", "training_runs?limit=3")
    before = [server.alice.get(f"/api/v1/{route}").json() for route in routes]
    monkeypatch.setattr(pages, "_FEW", -1)
    after = [server.alice.get(f"/api/v1/{route}") for route in routes]
    assert [answer.json() for answer in after] == before
    assert {answer.headers["content-type"] for answer in after} == {"application/json"}
