"""The calling key and the tokens made from it."""

from __future__ import annotations

import httpx
from tinker.cli.auth_api import SelfApiKeyResponse
from tinker.lib._jwt_auth import _is_invalid_token, jwt_claims

from tests.api.calls import ALICE, post
from tests.api.conftest import Served

ME = "/api/v1/auth/apikey/me"


def with_key(server: Served, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"X-API-Key": key})


def test_a_key_tells_whose_it_is(server: Served) -> None:
    shown = SelfApiKeyResponse.model_validate(server.alice.get(ME).json())
    assert (shown.name, shown.details.user_details.email) == ("alice …lice", "alice")
    assert shown.key_id != SelfApiKeyResponse.model_validate(server.bob.get(ME).json()).key_id
    assert "configuration" in shown.note


def test_a_key_revokes_itself_and_its_tokens_unless_it_is_configured(server: Served) -> None:
    key = server.services.tenants.create_key("alice")
    with with_key(server, key) as client:
        token = client.post("/api/v1/auth/token", json={}).json()["jwt"]
        with with_key(server, token) as by_token:
            assert by_token.get(ME).json() == client.get(ME).json()
            assert client.delete(ME).status_code == 204
            assert client.get(ME).status_code == 401
            assert by_token.get(ME).status_code == 401
    refused = server.alice.delete(ME)
    assert refused.status_code == 403
    assert "configuration" in refused.json()["detail"]
    assert server.alice.get(ME).status_code == 200


def test_a_token_opens_what_its_key_opens_in_either_header(server: Served, session_id: str) -> None:
    token = server.alice.post("/api/v1/auth/token", json={}).json()["jwt"]
    claims = jwt_claims(token)
    assert (claims["sub"], claims["org_id"], claims["email"]) == ("urn:tuft:tenant:alice", "tuft", "")
    assert ALICE not in str(claims)
    path = f"/api/v1/sessions/{session_id}"
    for headers in ({"X-API-Key": token}, {"Authorization": f"Bearer {token}"}):
        assert server.anyone.get(path, headers=headers).status_code == 200
    again = server.anyone.post("/api/v1/auth/token", json={}, headers={"X-API-Key": token})
    assert jwt_claims(again.json()["jwt"])["sub"] == "urn:tuft:tenant:alice"


def test_a_token_that_is_not_good_is_told_apart_from_a_wrong_key(server: Served) -> None:
    token = server.alice.post("/api/v1/auth/token", json={}).json()["jwt"]
    for wrong, replaceable in ((token[:-2], True), (token.replace(".", "", 1), True), ("tml-wrong", False)):
        response = server.anyone.get(ME, headers={"X-API-Key": wrong})
        assert response.status_code == 401
        assert _is_invalid_token(response) is replaceable


def test_clients_are_told_to_exchange_their_key_unless_that_is_switched_off(
    server: Served, loading_server: Served
) -> None:
    told = [post(served.alice, "client/config", sdk_version="0.38.0").json() for served in (server, loading_server)]
    assert [answer["pjwt_auth_enabled"] for answer in told] == [True, False]
