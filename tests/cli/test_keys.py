"""`tuft tenant` and `tuft key`, as they are typed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.conftest import Tuft
from tests.conftest import LiveServer
from tuft.app import ensure_first_key, open_store
from tuft.config import ALL_SCOPES, load_config
from tuft.errors import InvalidInput, NotFound
from tuft.service.services import open_tenants


def key_id_of(tuft: Tuft, name: str) -> str:
    return next(str(key["key_id"]) for key in json.loads(tuft("key", "list", "--json")) if key["name"] == name)


def test_a_key_is_printed_bare_and_opens_the_door(tuft: Tuft, tmp_path: Path) -> None:
    key = tuft("key", "create", "--tenant", "alice", "--name", "laptop").strip()
    config = load_config(home=tmp_path)
    database = open_store(config)
    record = open_tenants(config, database).key(key)
    assert (record.tenant.name, record.name, record.scopes) == ("alice", "laptop", ("train", "sample", "read"))
    database.close()


def test_scopes_and_an_expiry_are_chosen(tuft: Tuft) -> None:
    words = ("--scope", "read", "--scope", "sample", "--expires-days", "2", "--json")
    made: dict[str, Any] = json.loads(tuft("key", "create", "--tenant", "alice", *words))
    assert made["key"].startswith("tml-")
    assert made["scopes"] == ["sample", "read"]
    assert made["expires_at"][:10] > made["created_at"][:10]
    with pytest.raises(InvalidInput, match="scopes: got .'all'"):
        tuft("key", "create", "--tenant", "alice", "--scope", "all")


def test_keys_are_listed_without_what_opens_the_door(tuft: Tuft) -> None:
    keys = [tuft("key", "create", "--tenant", tenant, "--name", "k").strip() for tenant in ("bob", "alice")]
    shown = tuft("key", "list")
    assert [line.split()[1] for line in shown.splitlines() if "…" in line] == ["alice", "bob"]
    assert all(key not in shown and key[-4:] in shown for key in keys)
    only = json.loads(tuft("key", "list", "--tenant", "bob", "--json"))
    assert [(key["tenant"], key["state"], key["last_used_at"]) for key in only] == [("bob", "valid", None)]
    with pytest.raises(NotFound, match="'nobody' is unknown"):
        tuft("key", "list", "--tenant", "nobody")


def test_a_key_is_revoked_by_its_number(tuft: Tuft) -> None:
    tuft("key", "create", "--tenant", "alice", "--name", "lost")
    tuft("key", "revoke", key_id_of(tuft, "lost"))
    (key,) = json.loads(tuft("key", "list", "--json"))
    assert (key["state"], key["revoked_at"] is None) == ("revoked", False)
    with pytest.raises(NotFound, match="key: 7 is unknown"):
        tuft("key", "revoke", "7")


def test_a_rotated_key_ends_after_its_grace(tuft: Tuft) -> None:
    old = tuft("key", "create", "--tenant", "alice", "--name", "ci", "--scope", "train").strip()
    new = tuft("key", "rotate", key_id_of(tuft, "ci"), "--grace-hours", "0").strip()
    assert new != old
    keys = json.loads(tuft("key", "list", "--json"))
    assert [(key["hint"], key["name"], key["scopes"], key["state"]) for key in keys] == [
        (f"…{old[-4:]}", "ci", ["train"], "expired"),
        (f"…{new[-4:]}", "ci", ["train"], "valid"),
    ]


def test_the_key_that_a_launch_shows_is_rotated_too(tuft: Tuft, tmp_path: Path) -> None:
    config = load_config(home=tmp_path)
    database = open_store(config)
    tenants = open_tenants(config, database)
    first, _ = ensure_first_key(config, tenants)
    assert first is not None
    other = tuft("key", "create", "--tenant", "alice", "--name", "other").strip()
    tuft("key", "rotate", key_id_of(tuft, "other"))
    assert (tmp_path / "api_key").read_text().strip() == first
    new = tuft("key", "rotate", str(tenants.stored(first).number)).strip()
    assert ensure_first_key(config, tenants) == (new, False)
    assert tenants.key(new).scopes == ALL_SCOPES
    assert other != new
    database.close()


def test_tenants_are_made_listed_suspended_and_resumed(tuft: Tuft) -> None:
    made = json.loads(tuft("tenant", "create", "alice", "--json"))
    assert re.fullmatch(r"tenant-\w+", tuft("tenant", "create", "bob").strip())
    tuft("tenant", "suspend", "alice")
    assert "suspended since" in tuft("tenant", "list")
    listed = json.loads(tuft("tenant", "list", "--json"))
    assert [(item["name"], item["suspended_at"] is None) for item in listed] == [("alice", False), ("bob", True)]
    assert listed[0]["tenant_id"] == made["tenant_id"]
    tuft("tenant", "resume", "alice")
    assert "suspended since" not in tuft("tenant", "list")
    with pytest.raises(InvalidInput, match="exists already"):
        tuft("tenant", "create", "alice")


def test_a_running_server_follows_within_a_second(tuft: Tuft, tiny_server: LiveServer) -> None:
    home = tiny_server.home
    made = json.loads(tuft("key", "create", "--tenant", "passing", "--json", home=home))

    def status() -> int:
        time.sleep(1.0)
        headers = {"X-API-Key": made["key"]}
        return httpx.get(f"{tiny_server.url}/api/v1/auth/apikey/me", headers=headers).status_code

    assert status() == 200
    tuft("tenant", "suspend", "passing", home=home)
    assert status() == 403
    tuft("tenant", "resume", "passing", home=home)
    assert status() == 200
    tuft("key", "revoke", str(made["key_id"]), home=home)
    assert status() == 401
