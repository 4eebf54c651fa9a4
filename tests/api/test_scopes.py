"""Every route needs a scope of the key, said in one place; a key without it is told which."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.api.calls import BASE_MODEL, TOKENS, new_session, post, result
from tests.api.conftest import Served
from tests.api.test_auth import PUBLIC, all_routes
from tuft.api.http import API_PREFIX, create_app
from tuft.api.scopes import SCOPES, scope_of
from tuft.config import ALL_SCOPES, Scope


@pytest.fixture(scope="module")
def keyed(server: Served) -> Iterator[dict[Scope, httpx.Client]]:
    """For each scope, a client of alice's whose key has that one alone."""
    clients = {
        scope: httpx.Client(
            base_url=server.url,
            headers={"X-API-Key": server.services.tenants.create_key("alice", scopes=(scope,))},
            timeout=60,
        )
        for scope in ALL_SCOPES
    }
    yield clients
    for client in clients.values():
        client.close()


def routes_with_keys(server: Served) -> set[str]:
    return {f"{method} {path}" for method, path in all_routes(create_app(server.services)) if path not in PUBLIC}


def test_every_route_that_asks_for_a_key_says_which_scope_it_needs(server: Served) -> None:
    assert routes_with_keys(server) == set(SCOPES), "list the route in tuft/api/scopes.py"


def test_a_route_that_is_listed_nowhere_is_for_admins() -> None:
    assert scope_of("GET", f"{API_PREFIX}/new") == "admin"


@pytest.mark.parametrize("scope", ALL_SCOPES)
def test_a_key_of_one_scope_opens_what_needs_that_or_none(
    server: Served, keyed: dict[Scope, httpx.Client], scope: Scope
) -> None:
    for route in sorted(routes_with_keys(server) - {f"DELETE {API_PREFIX}/auth/apikey/me"}):
        method, path = route.split()
        response = keyed[scope].request(method, re.sub(r"\{[^}]+\}", "x", path), json={})
        refused = response.status_code == 403 and "needs an API key of scope" in response.text
        needed = SCOPES[route]
        assert refused == (needed not in (None, scope)), f"{route} answered {response.status_code} {response.text}"
        if refused:
            assert response.json()["detail"].startswith(f"{route} needs an API key of scope '{needed}'; this one (…")
            assert response.json()["detail"].endswith(f"has {scope}")


def test_a_key_that_only_samples_samples_and_does_not_train(keyed: dict[Scope, httpx.Client]) -> None:
    client = keyed["sample"]
    session_id = new_session(client)
    create = post(client, "create_model", session_id=session_id, model_seq_id=0, base_model=BASE_MODEL)
    assert create.status_code == 403
    opened = post(
        client, "create_sampling_session", session_id=session_id, sampling_session_seq_id=0, base_model=BASE_MODEL
    )
    prompt = {"chunks": [{"tokens": TOKENS}]}
    sampler_id = opened.json()["sampling_session_id"]
    sampled = post(client, "asample", sampling_session_id=sampler_id, seq_id=0, prompt=prompt, sampling_params={})
    assert sampled.status_code == 200


def test_a_token_has_the_scopes_of_its_key(server: Served, keyed: dict[Scope, httpx.Client]) -> None:
    token = keyed["read"].post("/api/v1/auth/token", json={}).json()["jwt"]
    for method, path, status in (("GET", "/api/v1/sessions", 200), ("POST", "/api/v1/create_model", 403)):
        assert server.anyone.request(method, path, headers={"X-API-Key": token}, json={}).status_code == status


def test_a_refused_body_is_not_read(keyed: dict[Scope, httpx.Client]) -> None:
    assert keyed["read"].post("/api/v1/forward_backward", content=b"{").status_code == 403
    assert keyed["train"].post("/api/v1/forward_backward", content=b"{").status_code == 400


def test_a_weights_access_token_needs_the_scope_read(
    server: Served, run_id: str, keyed: dict[Scope, httpx.Client]
) -> None:
    path = result(server.alice, post(server.alice, "save_weights", model_id=run_id, seq_id=1, path="c"))["path"]
    narrow, wide = (keyed[scope].headers["X-API-Key"] for scope in ("sample", "read"))
    copy = {"source_path": path, "destination_project_id": "p"}
    refused = post(server.bob, "copy_weights", weights_access_token=narrow, **copy)
    assert (refused.status_code, "of scope 'read'" in refused.text) == (400, True)
    assert post(server.bob, "copy_weights", weights_access_token=wide, **copy).status_code == 200
