from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from sqlalchemy import event

from tuft.config import ALL_SCOPES, Config
from tuft.errors import Forbidden, InvalidInput, InvalidToken, NotFound, Unauthorized
from tuft.records import Operator, now
from tuft.service import tenants as tenants_module
from tuft.service.audit import Audit
from tuft.service.services import open_tenants
from tuft.service.tenants import SERVER, Tenants
from tuft.store.audit import AuditLog
from tuft.store.db import Database, open_database

Opened = Callable[[], Tenants]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def again(database: Database, tmp_path: Path) -> Opened:
    """``again()``: the tenants as a server sees them that has just started."""
    return lambda: open_tenants(Config(home=tmp_path), database)


@pytest.fixture
def tenants(again: Opened) -> Tenants:
    return again()


def test_a_key_finds_its_tenant_and_a_second_key_the_same_one(tenants: Tenants) -> None:
    first, second = tenants.create_key("alice"), tenants.create_key("alice")
    assert first != second
    assert first.startswith("tml-")
    assert tenants.authenticate(first) == tenants.authenticate(second)
    assert tenants.authenticate(tenants.create_key("bob")) != tenants.authenticate(first)


def test_only_the_hash_of_a_key_is_kept(tenants: Tenants, database: Database, tmp_path: Path) -> None:
    key = tenants.create_key("alice")
    database.close()
    assert key.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_an_unknown_key_is_named_by_its_end_alone(tenants: Tenants) -> None:
    with pytest.raises(Unauthorized) as caught:
        tenants.authenticate("tml-secret-and-wrong-abcd")
    assert "…abcd" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "TINKER_API_KEY" in str(caught.value)


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_unauthorized(tenants: Tenants, key: str | None) -> None:
    with pytest.raises(Unauthorized, match="X-API-Key"):
        tenants.authenticate(key)


def test_a_key_without_the_sdks_prefix_is_refused_and_not_shown(tenants: Tenants) -> None:
    with pytest.raises(InvalidInput, match="tml-") as caught:
        tenants.accept("alice", "my-own-long-secret")
    assert "my-own" not in str(caught.value)


def test_a_configured_key_opens_the_door_only_while_it_is_configured(tenants: Tenants, again: Opened) -> None:
    tenants.accept("alice", "tml-configured")
    assert tenants.authenticate("tml-configured") == tenants.authenticate(tenants.create_key("alice"))
    token = tenants.token(tenants.key("tml-configured"))
    later = again()
    for credential in ("tml-configured", token):
        with pytest.raises(Unauthorized):
            later.authenticate(credential)
    later.accept("alice", "tml-configured")
    assert later.key("tml-configured").number == tenants.key("tml-configured").number


def test_a_revoked_key_stops_at_once_and_takes_its_tokens_along(tenants: Tenants, again: Opened) -> None:
    key, kept = tenants.create_key("alice"), tenants.create_key("alice")
    token = tenants.token(tenants.key(key))
    assert tenants.authenticate(token).name == "alice"
    tenants.revoke(tenants.key(token), by=SERVER)
    for opened in (tenants, again()):
        with pytest.raises(InvalidToken, match="revoked"):
            opened.authenticate(token)
        with pytest.raises(Unauthorized, match="invalid api key"):
            opened.authenticate(key)
        assert opened.authenticate(kept).name == "alice"


def test_a_configured_key_cannot_be_revoked(tenants: Tenants) -> None:
    tenants.accept("alice", "tml-configured")
    with pytest.raises(Forbidden, match="configuration"):
        tenants.revoke(tenants.key("tml-configured"), by=SERVER)
    assert tenants.authenticate("tml-configured").name == "alice"


def test_a_token_holds_over_a_restart_and_says_who_holds_it(tenants: Tenants, again: Opened, tmp_path: Path) -> None:
    key = tenants.create_key("alice")
    token = tenants.token(tenants.key(key))
    assert again().key(token) == tenants.key(key)
    claims = jwt.decode(token, tenants._secret, ["HS256"])
    assert claims["sub"] == "urn:tuft:tenant:alice"
    assert claims["exp"] - claims["iat"] == 24 * 3600
    assert (tmp_path / "signing_key").stat().st_mode & 0o077 == 0


def test_a_home_with_another_secret_takes_no_token_of_this_one(
    tenants: Tenants, database: Database, tmp_path: Path
) -> None:
    token = tenants.token(tenants.key(tenants.create_key("alice")))
    (tmp_path / "signing_key").unlink()
    with pytest.raises(InvalidToken):
        open_tenants(Config(home=tmp_path), database).authenticate(token)


def test_a_token_that_was_touched_unsigned_or_has_expired_is_refused(tenants: Tenants) -> None:
    token = tenants.token(tenants.key(tenants.create_key("alice")))
    header, claims, signature = token.split(".")
    read = jwt.decode(token, tenants._secret, ["HS256"])
    expired = jwt.encode({**read, "exp": read["iat"] - 1}, tenants._secret, "HS256")
    with pytest.raises(InvalidToken, match="expired"):
        tenants.key(expired)
    unsigned = jwt.encode(read, None, "none")
    without_end = jwt.encode({"key": read["key"]}, tenants._secret, "HS256")
    others = (f"{header}.{claims}.{signature[:-4]}AAAA", f"{header}.{claims}", unsigned, without_end, "eyJé", "eyJ")
    for forged in others:
        with pytest.raises(InvalidToken, match="not made by this server"):
            tenants.key(forged)


def test_a_key_that_another_process_revokes_is_refused_within_a_second(tenants: Tenants, again: Opened) -> None:
    key = tenants.create_key("alice")
    token = tenants.token(tenants.key(key))
    beside = again()
    beside.revoke(beside.stored(key), by=Operator("root"))
    wait_until_read_again(tenants)
    with pytest.raises(Unauthorized, match="invalid api key .*was revoked"):
        tenants.key(key)
    with pytest.raises(InvalidToken, match="was revoked"):
        tenants.key(token)


def test_a_tenant_that_another_process_suspends_is_refused_until_resumed(tenants: Tenants, again: Opened) -> None:
    tenants.accept("alice", "tml-configured")
    credentials = ["tml-configured", tenants.create_key("alice")]
    credentials.append(tenants.token(tenants.key(credentials[1])))
    beside = again()
    beside.suspend("alice", by=Operator("root"))
    wait_until_read_again(tenants)
    for credential in credentials:
        with pytest.raises(Forbidden, match="'alice' is suspended"):
            tenants.key(credential)
    beside.resume("alice", by=Operator("root"))
    wait_until_read_again(tenants)
    assert {tenants.key(credential).tenant.name for credential in credentials} == {"alice"}


def test_what_this_process_changes_counts_at_once(tenants: Tenants) -> None:
    key = tenants.create_key("alice")
    assert tenants.authenticate(key).name == "alice"
    tenants.suspend("alice", by=SERVER)
    with pytest.raises(Forbidden):
        tenants.authenticate(key)
    tenants.resume("alice", by=SERVER)
    assert tenants.authenticate(key).name == "alice"


def test_a_key_that_is_used_again_and_again_is_not_read_each_time(tenants: Tenants, database: Database) -> None:
    key = tenants.create_key("alice")
    queries: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
    for _ in range(50):
        tenants.key(key)
    assert len(queries) < 10


def test_a_key_expires_and_its_tokens_with_it(tenants: Tenants) -> None:
    key = tenants.create_key("alice", lifetime_s=3600.0)
    record = tenants.key(key)
    claims = jwt.decode(tenants.token(record), tenants._secret, ["HS256"])
    assert record.expires_at is not None
    assert claims["exp"] == math.ceil(record.expires_at.timestamp())
    tenants.revoke(record, by=SERVER)
    short = tenants.create_key("alice", lifetime_s=0.3)
    token = tenants.token(tenants.key(short))
    time.sleep(0.4)
    with pytest.raises(Unauthorized, match="invalid api key .*expired at 20"):
        tenants.key(short)
    with pytest.raises(InvalidToken, match="expired"):
        tenants.key(token)
    assert not tenants.knows(short)
    assert not tenants.has_keys()


def test_a_key_that_is_known_expires_between_two_reads_of_the_database(tenants: Tenants) -> None:
    key = tenants.create_key("alice", lifetime_s=0.2)
    tenants.key(key)
    time.sleep(0.3)
    with pytest.raises(Unauthorized, match="expired"):
        tenants.key(key)


def test_a_rotated_key_is_good_beside_the_new_one_for_its_grace(tenants: Tenants) -> None:
    old = tenants.create_key("alice", "laptop", ("read", "sample"), lifetime_s=7200.0)
    before = tenants.key(old)
    new = tenants.rotate(before, grace_s=3600.0, by=SERVER)
    after, ending = tenants.key(new), tenants.key(old)
    assert (after.tenant, after.name, after.scopes) == (before.tenant, "laptop", ("sample", "read"))
    assert before.expires_at is not None
    assert after.expires_at is not None
    assert ending.expires_at is not None
    assert after.expires_at >= before.expires_at
    assert ending.expires_at < before.expires_at
    final = tenants.rotate(after, grace_s=0.0, by=SERVER)
    with pytest.raises(Unauthorized, match="expired"):
        tenants.key(new)
    assert tenants.key(final).name == "laptop"


def test_a_key_that_ended_is_not_rotated(tenants: Tenants) -> None:
    key = tenants.create_key("alice")
    tenants.revoke(tenants.key(key), by=SERVER)
    with pytest.raises(InvalidInput, match="is revoked: create another"):
        tenants.rotate(tenants.stored(key), grace_s=0.0, by=SERVER)


def test_a_configured_key_is_listed_apart_and_cannot_be_rotated(tenants: Tenants) -> None:
    tenants.accept("alice", "tml-configured", ("sample",))
    key = tenants.key("tml-configured")
    assert tenants.find_key(key.number) == key
    assert tenants.configured_keys == (key,)
    assert tenants.keys(None, 10, 0) == ([], 0)
    with pytest.raises(Forbidden, match="configuration"):
        tenants.rotate(key, grace_s=0.0, by=SERVER)


@pytest.mark.parametrize("wrong", ["tml-configurex", "xml-configured", "tml-configured ", "tml-configure", "tml-é"])
def test_a_configured_key_is_compared_whole(tenants: Tenants, wrong: str) -> None:
    tenants.accept("bob", "tml-other")
    tenants.accept("alice", "tml-configured")
    with pytest.raises(Unauthorized):
        tenants.key(wrong)


def test_a_key_without_the_scope_is_told_what_is_needed_and_what_it_has(tenants: Tenants) -> None:
    key = tenants.key(tenants.create_key("alice", scopes=("read", "sample")))
    tenants.require(key, "sample", "POST /api/v1/asample")
    with pytest.raises(Forbidden) as caught:
        tenants.require(key, "train", "POST /api/v1/create_model")
    assert str(caught.value) == (
        f"POST /api/v1/create_model needs an API key of scope 'train'; this one (…{key.hint}) has sample, read"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scopes": ()}, "scopes: got []; must be some of train, sample, read, admin"),
        ({"scopes": ("train", "all")}, "scopes: got ['train', 'all']"),
        ({"lifetime_s": 0.0}, "lifetime_s: got 0.0; must be above 0"),
        ({"lifetime_s": float("nan")}, "lifetime_s: got nan"),
        ({"lifetime_s": float("inf")}, "lifetime_s: got inf"),
        ({"name": "../x"}, "name: got '../x'"),
        ({"name": "x" * 65}, "at most 64"),
        ({"tenant_name": "x" * 65}, "at most 64"),
        ({"tenant_name": ""}, "tenant: got ''"),
    ],
)
def test_a_key_that_cannot_be_made_changes_nothing(tenants: Tenants, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        tenants.create_key(**{"tenant_name": "alice", **arguments})
    assert message in str(caught.value)
    assert tenants.tenants(10, 0) == ([], 0)


@pytest.mark.parametrize("grace_s", [-1.0, float("nan"), float("inf")])
def test_a_grace_that_cannot_be_is_named(tenants: Tenants, grace_s: float) -> None:
    key = tenants.create_key("alice")
    with pytest.raises(InvalidInput, match="grace_s"):
        tenants.rotate(tenants.key(key), grace_s, by=SERVER)
    assert tenants.keys(None, 10, 0)[1] == 1


def test_a_tenant_is_made_once_and_an_unknown_one_is_named(tenants: Tenants) -> None:
    tenants.create_tenant("alice", by=SERVER)
    with pytest.raises(InvalidInput, match="tenant: got 'alice'; exists already"):
        tenants.create_tenant("alice", by=SERVER)
    for call in (tenants.suspend, tenants.resume):
        with pytest.raises(NotFound, match="tenant: 'bob' is unknown"):
            call("bob", by=SERVER)
    with pytest.raises(NotFound, match="key: 7 is unknown"):
        tenants.find_key(7)


def test_an_admin_cannot_lock_out_their_own_tenant(tenants: Tenants) -> None:
    admin = tenants.key(tenants.create_key("root", scopes=ALL_SCOPES))
    with pytest.raises(Forbidden, match="your own"):
        tenants.suspend("root", by=admin)
    tenants.suspend("root", by=Operator("who-has-the-machine"))


async def audited(database: Database) -> list[tuple[str, str, Any, Any]]:
    entries = await Audit(AuditLog(database), 1).of_day(None, "organizations", now().date())
    return [
        (
            entry.tenant,
            entry.event,
            entry.details["actor"],
            entry.details.get("key_number", entry.details.get("reason")),
        )
        for entry in entries
    ]


async def test_every_change_is_audited_with_who_did_it(tenants: Tenants, database: Database) -> None:
    operator = Operator("root")
    admin = tenants.key(tenants.create_key("chief", scopes=ALL_SCOPES, by=operator))
    first = tenants.key(tenants.create_key("alice", by=admin))
    second = tenants.key(tenants.rotate(first, 60.0, by=admin))
    tenants.revoke(second, by=second)
    tenants.suspend("alice", by=admin)
    tenants.suspend("alice", by=admin)
    tenants.resume("alice", by=operator)
    noted = await audited(database)
    chief, alice, root = "urn:tuft:tenant:chief", "urn:tuft:tenant:alice", "urn:tuft:operator:root"
    assert [entry for entry in noted if entry[0] == "alice"] == [
        ("alice", "tenant_create", chief, None),
        ("alice", "key_create", chief, first.number),
        ("alice", "key_rotate", chief, second.number),
        ("alice", "key_revoke", alice, second.number),
        ("alice", "tenant_suspend", chief, None),
        ("alice", "tenant_resume", root, None),
    ]
    assert ("chief", "key_create", root, admin.number) in noted
    assert ("chief", "key_create", chief, first.number) in noted


async def test_the_use_of_a_key_that_ended_is_noted_once_and_always_counted(
    tenants: Tenants, database: Database
) -> None:
    ended, narrow = tenants.create_key("alice"), tenants.key(tenants.create_key("alice", scopes=("read",)))
    tenants.revoke(tenants.stored(ended), by=SERVER)
    for _ in range(3):
        with pytest.raises(Unauthorized):
            tenants.key(ended)
        with pytest.raises(Unauthorized):
            tenants.key("tml-guess")
        with pytest.raises(Forbidden):
            tenants.require(narrow, "admin", "GET /api/v1/admin/keys")
        await tenants.sweep()
    assert dict(tenants.num_refused) == {"revoked": 3, "unknown": 3, "scope admin": 3}
    entries = await Audit(AuditLog(database), 1).of_day(None, "organizations", now().date())
    refused = [entry.details for entry in entries if entry.event == "key_refuse"]
    assert [details["reason"] for details in refused] == ["revoked", "scope admin"]
    assert ended not in str(refused)
    assert "tml-guess"[-4:] not in str(entries)


async def test_when_a_key_was_used_last_is_written_now_and_then(tenants: Tenants) -> None:
    tenants.accept("alice", "tml-configured")
    key = tenants.create_key("alice")
    assert tenants.stored(key).last_used_at is None
    tenants.key("tml-configured")
    tenants.key(key)
    await tenants.flush()
    assert tenants.stored(key).last_used_at is not None


def wait_until_read_again(tenants: Tenants) -> None:
    time.sleep(tenants_module._READ_EVERY_S + 0.05)
