"""Another tenant's id is answered like one that nobody has, on every route and for every kind of id.

The application's own routes are enumerated: one that is not in ``grid.py`` fails here, and so does a parameter of which
nobody has said what it names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy import select
from starlette.routing import Route

from tests.isolation.conftest import Grid
from tests.isolation.grid import CASES, KIND_OF_FIELD, NAMELESS, NO_IDS, OPERATORS, Case
from tests.isolation.things import TEAM, answer_to, nobodys, signed
from tuft.api.document import readers
from tuft.api.http import ROUTERS
from tuft.records import now
from tuft.service.audit import DENIED
from tuft.service.ownership import LINK_DENIED
from tuft.store import tables

BY_LABEL = {case.label: case for case in CASES}
VOLATILE = {"heard_at", "last_request_at", "verified_at", "forget_at_s"}  # by the server's own clock
_WAIT_S = 20.0


# --- the table is complete --------------------------------------------------------------------------------------------


def test_every_route_is_in_the_table(grid: Grid) -> None:
    found = set(routes(grid.recorder.app))
    operators = {route for route in found if route.split()[1].startswith(OPERATORS)}
    listed = {case.route for case in CASES} | set(NAMELESS)
    assert found - operators - listed == set(), "say in grid.py which ids they take"
    assert listed - found == set(), "they are no routes"


def routes(app: FastAPI) -> Iterator[str]:
    """``METHOD path`` of all that the application answers."""
    known = [router for _, router in ROUTERS]
    for route in app.routes:
        if isinstance(route, APIRoute):
            yield from (f"{method} {route.path_format}" for method in route.methods or ())
        elif isinstance(route, Route):
            yield f"GET {route.path_format}"
        else:  # FastAPI keeps a router that was included as it is
            assert getattr(route, "original_router", None) in known, f"{route} has routes that nobody looks into"
    for prefix, router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            yield from (f"{method} {prefix}{route.path_format}" for method in route.methods or ())


def test_every_parameter_that_names_something_has_a_case() -> None:
    missing, unknown = [], []
    for route, names in parameters().items():
        if OPERATORS in route:
            continue
        kinds = {case.kind for case in CASES if case.route == route}
        if "{kind}/{name}" in route or "/traces/" in route:  # these parts together are one name
            assert kinds, route
            continue
        for name in names - NO_IDS:
            if name not in KIND_OF_FIELD:
                unknown.append(f"{route}: {name}")
            elif KIND_OF_FIELD[name] not in kinds:
                missing.append(f"{route}: {name}")
    assert unknown == [], "say in grid.py what they name"
    assert missing == [], "no case names such a thing"


def test_labels_are_unique() -> None:
    assert len(BY_LABEL) == len(CASES)


@cache
def parameters() -> Mapping[str, set[str]]:
    """Of each route: the names of all that it takes from path, query and body."""
    bodies = readers(ROUTERS)
    found: dict[str, set[str]] = {}
    for prefix, router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods or ():
                path = prefix + route.path_format
                given = [*route.dependant.path_params, *route.dependant.query_params]
                names = {parameter.name for parameter in given}
                reader = bodies.get((path, method))
                for model in () if reader is None else (reader.model.one_of or (reader.model,)):
                    names |= set(fields(model))
                found[f"{method} {path}"] = names
    return found


def fields(model: type[BaseModel]) -> Iterator[str]:
    for name, info in model.model_fields.items():
        inner = list(models_in(info.annotation))
        if not inner:
            yield name
        for one in inner:
            yield from fields(one)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from models_in(part)


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", sorted(BY_LABEL))
def test_a_strangers_answer_tells_nothing_and_costs_the_owner_nothing(grid: Grid, label: str) -> None:
    case = BY_LABEL[label]
    stranger = grid.tenant(f"eve-{sorted(BY_LABEL).index(label)}")
    before = owned_by(grid)
    unknown, foreign, other = nobodys(grid.things), grid.things, nobodys(grid.things)
    answers, reads = [], []
    for number, things in enumerate((unknown, foreign, other)):
        name = f"{label} {number}"
        answers.append(answer_to(stranger, stranger.send(case, things, record=name), things))
        reads.append([plain(read, things, stranger.mine) for read in grid.recorder.reads[name]])
    assert answers[1] == answers[0]
    assert reads[1] in (reads[0], reads[2])
    assert owned_by(grid) == before
    rows = denied_to(grid, stranger.name, case)
    if case.is_audited:
        assert [(row["kind"], row["id"]) for row in rows] == [(case.kind, named(case, foreign))]
    else:
        assert rows == []


def test_a_stranger_is_not_told_by_their_own_audit_log(grid: Grid) -> None:
    stranger = grid.tenant("mallory")
    stranger.http.get(f"/api/v1/training_runs/{grid.things['RUN']}")
    assert denied_to(grid, "mallory", BY_LABEL["GET /api/v1/training_runs/{run_id} run"])
    seen = {entry["event"] for entry in stranger.http.get("/api/v1/audit").json()["entries"]}
    assert seen == {"tenant_create", "key_create"}


def test_one_who_tries_again_and_again_leaves_one_row(grid: Grid) -> None:
    stranger = grid.tenant("trudy")
    case = BY_LABEL["POST /api/v1/get_info run"]
    for _ in range(2):
        for _ in range(20):
            stranger.send(case, grid.things)
        assert len(denied_to(grid, "trudy", case)) == 1


def test_routes_of_operators_are_closed_to_whoever_is_none(grid: Grid) -> None:
    stranger = grid.tenant("oscar")
    number = grid.owner.http.get("/api/v1/auth/apikey/me").json()["key_id"]
    for route in parameters():
        method, path = route.split()
        if not path.startswith(OPERATORS):
            continue
        answers = {
            stranger.http.request(method, path.format(key_id=key_id, tenant_name=name), json={}).text
            for key_id, name in ((number, grid.owner.name), (number ^ 1, "nobody"))
        }
        assert len(answers) == 1
        assert "scope 'admin'" in answers.pop()


# --- the test can fail ------------------------------------------------------------------------------------------------


def test_a_member_of_the_project_is_let_in_where_it_is_shared(grid: Grid) -> None:
    wrong = []
    for case in CASES:
        if case.kind in ("project", "tenant") or not case.has_key or not case.is_audited:
            continue
        unknown = nobodys(grid.things)
        refused = answer_to(grid.member, grid.member.send(case, unknown), unknown)
        answer = answer_to(grid.member, grid.member.send(case, grid.things), grid.things)
        if case.member != (answer != refused and is_success(answer)):
            wrong.append((case.label, answer, refused))
    assert wrong == []
    denied = {row["action"] for row in settled_rows(grid, grid.member.name)}
    assert denied, "of what is not shared"
    assert not denied & (
        {case.route for case in CASES if case.member} - {case.route for case in CASES if not case.member}
    )


def test_what_a_stranger_calls_by_a_projects_name_is_none_of_its_members(grid: Grid) -> None:
    stranger = grid.tenant("walter")
    session_id = stranger.http.post("/api/v1/create_session", json={"project_id": TEAM}).json()["session_id"]
    search = {"project_ids": [TEAM], "owner": {"type": "accessible"}}
    for client, is_theirs in ((stranger, True), (grid.owner, False), (grid.member, False)):
        found = client.http.post("/api/v1/sessions/search", json=search).json()["sessions"]
        assert (session_id in {session["session_id"] for session in found}) == is_theirs
        status = client.http.get(f"/api/v1/sessions/{session_id}?access_scope=accessible").status_code
        assert status == (200 if is_theirs else 404)


def test_the_owner_gets_another_answer(grid: Grid) -> None:
    """Last of all: it ends the owner's things."""
    stranger = grid.tenant("frank")
    foreign = [answer_to(stranger, stranger.send(case, grid.things), grid.things) for case in CASES]
    links = signed(grid.owner, grid.things)
    of_owner = {f"MY_{name}": grid.things[name] for name in ("SESSION", "RUN", "SAMPLER", "CHECKPOINT")}
    grid.owner.mine.update(of_owner)
    own = [answer_to(grid.owner, grid.owner.send(case, links), grid.things) for case in CASES]
    alike = [case.label for case, a, b in zip(CASES, own, foreign, strict=True) if a == b]
    assert alike == [
        "POST /api/v1/create_session project",  # to a stranger it is a label, which is nothing to be refused
        "POST /api/v1/copy_weights project",
        "PUT /api/v1/sessions/{session_id}/project project",
    ]


def is_success(answer: tuple[Any, ...]) -> bool:
    return answer[0] < 400 and "'error'" not in answer[2]


def named(case: Case, things: Mapping[str, str]) -> str:
    """The id that the case names, as services call it."""
    if case.kind == "checkpoint" and "external_weights" in case.path:
        return f"tinker://{things['RUN']}/external_weights/out"
    if case.kind == "future" and "PENDING" in str(case.body):
        return things["PENDING"]
    names = {"link": "CHECKPOINT", "trace": "SESSION", "custom_loss": "LOSS"}
    return things[names.get(case.kind, case.kind.upper())]


def plain(read: str, things: Mapping[str, str], mine: Mapping[str, str]) -> str:
    for value in (*things.values(), *mine.values()):
        read = read.replace(value, "ID")
    return read


def denied_to(grid: Grid, name: str, case: Case) -> list[dict[str, Any]]:
    """The rows about that tenant's call of the case's route, as soon as there is one."""
    who, event = (name, DENIED) if case.has_key else (grid.owner.name, LINK_DENIED)
    deadline = time.monotonic() + (_WAIT_S if case.is_audited else 1.5)
    while time.monotonic() < deadline:
        if found := [row for row in rows_of(grid, who, event) if row["kind"] == case.kind]:
            return found
        time.sleep(0.05)
    return []


def settled_rows(grid: Grid, name: str) -> list[dict[str, Any]]:
    """All of the tenant's that are to come: rows are written soon after the answer."""
    stranger = grid.tenant(f"after-{name}")
    case = BY_LABEL["POST /api/v1/get_info run"]
    stranger.send(case, grid.things)
    assert denied_to(grid, stranger.name, case)
    return rows_of(grid, name, DENIED)


def rows_of(grid: Grid, name: str, event: str) -> list[dict[str, Any]]:
    services = grid.served.services
    tenant = services.tenants.named(name)
    log = services.audit._log
    entries, _ = log.newest(tenant.tenant_id, None, now().replace(hour=0, minute=0), now(), 10_000)
    return [dict(entry.details) for entry in entries if entry.event == event]


def owned_by(grid: Grid) -> Any:
    """Every row of the owner's, every file of theirs, and what they see of it themselves."""
    services = grid.served.services
    owner = services.tenants.named(grid.owner.name)
    database = services.audit._log._database
    rows: dict[str, Any] = {}
    for table in tables.metadata.sorted_tables:
        if "tenant_id" in table.c and table.name not in ("audit_log", "api_keys", "ledger"):
            columns = [column for column in table.c if column.name not in VOLATILE]
            found = database.all(select(*columns).where(table.c.tenant_id == owner.tenant_id))
            rows[table.name] = sorted(map(repr, found))
    root = services.config.home / "checkpoints" / owner.tenant_id
    files = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*"))
    lists = ("training_runs", "checkpoints", "sessions", f"sessions/{grid.things['SESSION']}")
    return rows, files, [grid.owner.http.get(f"/api/v1/{path}").text for path in lists]
