"""Tenants, keys and everyone's audit log, through the admin API."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import Served
from tuft.config import ALL_SCOPES

ADMIN = "/api/v1/admin"
_names = (f"tenant-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def admin(server: Served) -> Iterator[httpx.Client]:
    key = server.services.tenants.create_key("chief", "of-tests", ALL_SCOPES)
    with httpx.Client(base_url=server.url, headers={"X-API-Key": key}, timeout=60) as client:
        yield client


@pytest.fixture
def tenant(admin: httpx.Client) -> str:
    """The name of a tenant of the test's own."""
    made = admin.post(f"{ADMIN}/tenants", json={"name": next(_names)})
    assert made.status_code == 201, made.text
    return str(made.json()["name"])


def create_key(admin: httpx.Client, tenant: str, **more: Any) -> dict[str, Any]:
    made = admin.post(f"{ADMIN}/keys", json={"tenant": tenant, **more})
    assert made.status_code == 201, made.text
    content: dict[str, Any] = made.json()
    return content


def me(server: Served, key: str) -> httpx.Response:
    return server.anyone.get("/api/v1/auth/apikey/me", headers={"X-API-Key": key})


def test_tenants_are_made_and_listed(admin: httpx.Client, tenant: str) -> None:
    create_key(admin, tenant)
    listed = admin.get(f"{ADMIN}/tenants", params={"limit": 1000}).json()
    found = {item["name"]: item for item in listed["tenants"]}
    assert found[tenant]["num_keys"] == 1
    assert found[tenant]["suspended_at"] is None
    assert {"alice", "bob", "chief"} <= set(found)
    assert listed["cursor"]["total_count"] == len(found)
    again = admin.post(f"{ADMIN}/tenants", json={"name": tenant})
    assert (again.status_code, again.json()["detail"]) == (400, f"tenant: got '{tenant}'; exists already")


def test_a_key_that_is_made_opens_the_door_and_is_never_shown_again(
    server: Served, admin: httpx.Client, tenant: str
) -> None:
    made = create_key(admin, tenant, name="laptop", scopes=["read"], lifetime_s=3600)
    assert made["key"].startswith("tml-")
    assert (made["tenant"], made["name"], made["scopes"], made["state"]) == (tenant, "laptop", ["read"], "valid")
    shown = me(server, made["key"]).json()
    assert shown["key_id"] == made["key_id"]
    assert shown["name"] == f"{tenant} laptop …{made['key'][-4:]}"
    assert (shown["scopes"], shown["expires_at"]) == (["read"], made["expires_at"])
    listed = admin.get(f"{ADMIN}/keys", params={"tenant": tenant})
    assert [item["key_id"] for item in listed.json()["keys"]] == [made["key_id"]]
    assert made["key"] not in listed.text


def test_configured_keys_are_listed_and_stay(admin: httpx.Client) -> None:
    listed = admin.get(f"{ADMIN}/keys", params={"tenant": "alice"}).json()
    (configured,) = listed["configured"]
    assert (configured["hint"], configured["created_at"]) == ("…lice", None)
    for refused in (
        admin.delete(f"{ADMIN}/keys/{configured['key_id']}"),
        admin.post(f"{ADMIN}/keys/{configured['key_id']}/rotate", json={}),
    ):
        assert refused.status_code == 403
        assert "configuration" in refused.json()["detail"]


def test_a_revoked_key_is_refused_and_stays_in_the_list(server: Served, admin: httpx.Client, tenant: str) -> None:
    made = create_key(admin, tenant)
    assert me(server, made["key"]).status_code == 200
    assert admin.delete(f"{ADMIN}/keys/{made['key_id']}").status_code == 204
    refused = me(server, made["key"])
    assert refused.status_code == 401
    assert "was revoked" in refused.json()["detail"]
    (listed,) = admin.get(f"{ADMIN}/keys", params={"tenant": tenant}).json()["keys"]
    assert listed["state"] == "revoked"


def test_a_rotated_key_is_good_for_its_grace(server: Served, admin: httpx.Client, tenant: str) -> None:
    old = create_key(admin, tenant, name="ci", scopes=["sample", "read"])
    new = admin.post(f"{ADMIN}/keys/{old['key_id']}/rotate", json={"grace_s": 60}).json()
    assert (new["name"], new["scopes"]) == ("ci", ["sample", "read"])
    assert me(server, old["key"]).status_code == me(server, new["key"]).status_code == 200
    newest = admin.post(f"{ADMIN}/keys/{new['key_id']}/rotate", json={"grace_s": 0}).json()
    assert me(server, new["key"]).status_code == 401
    assert me(server, newest["key"]).status_code == 200


def test_a_suspended_tenant_is_refused_until_resumed(server: Served, admin: httpx.Client, tenant: str) -> None:
    key = create_key(admin, tenant)["key"]
    assert admin.post(f"{ADMIN}/tenants/{tenant}/suspend").status_code == 204
    refused = me(server, key)
    assert (refused.status_code, "suspended" in refused.json()["detail"]) == (403, True)
    assert admin.post(f"{ADMIN}/tenants/{tenant}/resume").status_code == 204
    assert me(server, key).status_code == 200


def test_an_admin_does_not_suspend_their_own_tenant(admin: httpx.Client) -> None:
    assert admin.post(f"{ADMIN}/tenants/chief/suspend").status_code == 403


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"tenant": "nobody"}, 404, "tenant: 'nobody' is unknown"),
        ({"tenant": "alice", "scopes": ["all"]}, 400, "scopes.0: got 'all'"),
        ({"tenant": "alice", "scopes": []}, 400, "scopes: got []"),
        ({"tenant": "alice", "lifetime_s": 0}, 400, "lifetime_s: got 0"),
        ({"tenant": "alice", "name": "a/b"}, 400, "name: got 'a/b'"),
        ({}, 400, "tenant: got None; is required"),
    ],
)
def test_a_key_that_cannot_be_made_is_explained(
    admin: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    response = admin.post(f"{ADMIN}/keys", json=body)
    assert response.status_code == status
    assert response.json()["detail"].startswith(message)


@pytest.mark.parametrize("key_id", ["7", "x", "-1", str(2**48)])
def test_a_key_that_does_not_exist_is_explained(admin: httpx.Client, key_id: str) -> None:
    for response in (admin.delete(f"{ADMIN}/keys/{key_id}"), admin.post(f"{ADMIN}/keys/{key_id}/rotate", json={})):
        assert response.status_code == (404 if key_id == "7" else 400)
        assert "key" in response.json()["detail"]


def test_the_log_of_all_tenants_tells_who_changed_what(server: Served, admin: httpx.Client, tenant: str) -> None:
    made = create_key(admin, tenant, name="laptop")
    me(server, "tml-wrong")
    answer = admin.get(f"{ADMIN}/audit", params={"event_type": "organizations"}).json()
    (entry,) = [
        entry
        for entry in answer["entries"]
        if entry["tenant"] == tenant and entry["event_details"].get("key_number") == made["key_id"]
    ]
    assert entry["event"] == "key_create"
    assert entry["event_details"]["actor"] == "urn:tuft:tenant:chief"
    assert entry["event_details"]["scopes"] == "train sample read"
    assert made["key"] not in str(answer)
    assert answer["refused_since_start"]["unknown"] > 0
    only = admin.get(f"{ADMIN}/audit", params={"tenant": tenant}).json()["entries"]
    assert {entry["tenant"] for entry in only} == {tenant}
    own = server.anyone.get("/api/v1/audit", headers={"X-API-Key": made["key"]}).json()["entries"]
    assert [entry["event"] for entry in own] == ["tenant_create", "key_create"]
    assert admin.get(f"{ADMIN}/audit", params={"tenant": "nobody"}).status_code == 404
