"""A server of its own, which tells of each request what was read for it: statements of the database, files opened."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.api.calls import BASE_MODEL, LIMIT_BYTES
from tests.api.conftest import Served, serving
from tests.isolation.things import HERS, TEAM, Client, make_things
from tuft.app import start_engine
from tuft.config import Config
from tuft.service import ownership

OWNER, MEMBER = "alice", "carol"
_READS: ContextVar[list[str] | None] = ContextVar("reads", default=None)
_OF_THE_CALLER = re.compile(r"FROM (api_keys|quotas|ledger)")
"""Read now and then, whoever calls and whatever is asked."""


def _note_file(name: str, arguments: tuple[Any, ...]) -> None:
    if name == "open" and (reads := _READS.get()) is not None:
        reads.append(f"open {arguments[0]}")


sys.addaudithook(_note_file)  # for good: hooks cannot be taken away


def _note_statement(_c: Any, _cursor: Any, statement: str, *_more: Any) -> None:
    if (reads := _READS.get()) is not None and not _OF_THE_CALLER.search(statement):
        reads.append(statement)


@dataclass
class Recorder:
    """Around the application: what was read for each request that bears a name (``X-Record``)."""

    reads: dict[str, list[str]] = field(default_factory=dict)
    app: Any = None

    def __call__(self, app: ASGIApp) -> ASGIApp:
        self.app = app

        async def record(scope: Scope, receive: Receive, send: Send) -> None:
            name = dict(scope.get("headers", ())).get(b"x-record", b"").decode()
            reads: list[str] = []
            token = _READS.set(reads if name else None)
            self.reads[name] = reads  # before the answer, which is here before the application returns
            try:
                await app(scope, receive, send)
            finally:
                _READS.reset(token)

        return record


@dataclass
class Grid:
    served: Served
    recorder: Recorder
    owner: Client
    member: Client
    things: dict[str, str]

    def tenant(self, name: str) -> Client:
        """One who has nothing yet."""
        key = self.served.services.tenants.create_key(name)
        http = httpx.Client(base_url=self.served.url, headers={"X-API-Key": key}, timeout=60)
        return Client(name, http)


@pytest.fixture(scope="package")
def grid_config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Config:
    return Config(
        home=tmp_path_factory.mktemp("isolation"),
        server={"long_poll_s": 0.2, "drain_timeout_s": 0.0},
        engine={"device": "cpu", "num_threads": 1, "compiled_kernels": False},
        limits={"max_request_bytes": LIMIT_BYTES, "max_runs_per_tenant": 1000, "seq_gap_timeout_s": 3600.0},
        base_models=[{"name": BASE_MODEL, "path": str(tiny_model), "precision": "float32"}],
        projects=[{"project_id": TEAM, "tenants": [OWNER, MEMBER]}, {"project_id": HERS, "tenants": [OWNER]}],
    )


@pytest.fixture(scope="package")
def grid(grid_config: Config) -> Iterator[Grid]:
    recorder = Recorder()
    patched = pytest.MonkeyPatch()
    patched.setattr(ownership, "_CHECK_AFTER_S", 0.02)  # sixty cases wait for their rows
    engine = start_engine(grid_config)
    event.listen(Engine, "before_cursor_execute", _note_statement)
    try:
        engine.wait_ready(timeout_s=60)
        with serving(grid_config, engine, around=recorder) as served:
            grid = Grid(served, recorder, None, None, {})  # type: ignore[arg-type]
            grid.owner, grid.member = grid.tenant(OWNER), grid.tenant(MEMBER)
            grid.things = make_things(grid.owner)
            yield grid
    finally:
        patched.undo()
        event.remove(Engine, "before_cursor_execute", _note_statement)
        engine.close()
