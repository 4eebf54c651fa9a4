"""No route is open unless it says so here, and a key opens its own tenant's things only."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest
from fastapi import FastAPI
from starlette.routing import Route

from tests.api.calls import ALICE, BASE_MODEL, TOKENS, cross_entropy, post, result
from tests.api.conftest import Served
from tuft import api
from tuft.api.http import API_PREFIX, create_app

PUBLIC = {
    "/",
    "/readyz",
    f"{API_PREFIX}/healthz",
    f"{API_PREFIX}/download/{{run_id}}/{{kind}}/{{name}}/{{file}}",  # the link's signature is its key
    f"{API_PREFIX}/traces/{{session_id}}",
    "/openapi.json",
    "/docs",
    "/{name}/resolve/{revision}/{file}",
    "/api/models/{name}",
    "/api/models/{name}/revision/{revision}",
    "/api/models/{name}/tree/{revision}",
    "/api/models/{name}/tree/{revision}/{folder}",
}


def all_routes(app: FastAPI) -> set[tuple[str, str]]:
    described = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    return described | {("GET", route.path) for route in app.routes if isinstance(route, Route)}


def test_every_route_wants_a_key_unless_it_is_public(server: Served) -> None:
    routes = all_routes(create_app(server.services))
    assert len(routes) > 35
    assert {path for _, path in routes} >= PUBLIC
    for method, path in sorted(routes):
        if path in PUBLIC:
            continue
        concrete = re.sub(r"\{[^}]+\}", "x", path)
        for headers in (
            {},
            {"X-API-Key": "tml-wrong"},
            {"Authorization": "Bearer tml-wrong"},
            {"X-API-Key": "eyJ.x.y"},
        ):
            response = server.anyone.request(method, concrete, headers=headers, json={})
            assert response.status_code == 401, f"{method} {path} answered {response.status_code} to {headers}"
            assert response.json()["detail"]
            assert response.headers["www-authenticate"].startswith("Bearer")


def test_no_route_is_hidden_from_the_test_above() -> None:
    parts = [importlib.import_module(f"tuft.api.{module.name}") for module in pkgutil.iter_modules(api.__path__)]
    routers = [part.router for part in parts if hasattr(part, "router")]
    assert len(routers) > 8
    for router in routers:
        assert router.routes
        assert all(route.include_in_schema for route in router.routes)


def test_a_key_is_taken_from_either_header(server: Served) -> None:
    bearer = server.anyone.get("/api/v1/sessions", headers={"Authorization": f"Bearer {ALICE}"})
    assert bearer.status_code == server.alice.get("/api/v1/sessions").status_code == 200


def test_an_unknown_key_is_named_by_its_end_only(server: Served) -> None:
    response = server.anyone.get("/api/v1/sessions", headers={"X-API-Key": "tml-0123456789"})
    assert response.status_code == 401
    assert "6789" in response.json()["detail"]
    assert "tml-0123456789" not in response.text


@pytest.mark.parametrize("seq_id", [1, 7])
def test_a_run_of_another_tenant_is_as_good_as_none(server: Served, run_id: str, seq_id: int) -> None:
    operation = {"model_id": run_id, "seq_id": seq_id}
    attempts = [
        post(server.bob, "get_info", model_id=run_id),
        post(server.bob, "unload_model", model_id=run_id),
        post(server.bob, "forward", forward_input=cross_entropy(TOKENS), **operation),
        post(server.bob, "forward_backward", forward_backward_input="nonsense", **operation),
        post(server.bob, "optim_step", adam_params={}, **operation),
        post(server.bob, "optim_step", adam_params={"beta1": "nonsense"}, **operation),
        post(server.bob, "save_weights", path="a", **operation),
        post(server.bob, "save_weights_for_sampler", path="a", **operation),
        post(server.bob, "load_weights", path="tinker://x/weights/a", optimizer=False, **operation),
        server.bob.get(f"/api/v1/training_runs/{run_id}"),
        server.bob.get(f"/api/v1/training_runs/{run_id}/checkpoints"),
    ]
    assert [response.status_code for response in attempts] == [404] * len(attempts)
    assert {response.json()["detail"] for response in attempts} == {f"model_id: {run_id!r} is unknown"}


def test_a_future_a_sampler_and_a_session_of_another_tenant_are_as_good_as_none(
    server: Served, run_id: str, session_id: str, sampler_id: str
) -> None:
    step = post(server.alice, "optim_step", model_id=run_id, seq_id=1, adam_params={})
    result(server.alice, step)
    assert post(server.bob, "retrieve_future", request_id=step.json()["request_id"]).status_code == 410
    assert server.bob.get(f"/api/v1/samplers/{sampler_id}").status_code == 404
    prompt = {"chunks": [{"tokens": TOKENS}]}
    sample = post(server.bob, "asample", sampling_session_id=sampler_id, seq_id=0, prompt=prompt, sampling_params={})
    assert sample.status_code == 404
    assert server.bob.get(f"/api/v1/sessions/{session_id}").status_code == 404
    assert post(server.bob, "session_heartbeat", session_id=session_id).status_code == 410
    finish = server.bob.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})
    assert finish.status_code == 404
    create = post(server.bob, "create_model", session_id=session_id, model_seq_id=5, base_model=BASE_MODEL)
    assert create.status_code == 404
    assert post(server.alice, "session_heartbeat", session_id=session_id).status_code == 200
