from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jwt
import pytest

from tuft.config import Config
from tuft.errors import Forbidden, InvalidInput, InvalidToken, Unauthorized
from tuft.service.services import open_tenants
from tuft.service.tenants import Tenants
from tuft.store.db import Database, open_database, sqlite_url

Opened = Callable[[], Tenants]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(sqlite_url(tmp_path))
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
    tenants.revoke(tenants.key(token))
    for opened in (tenants, again()):
        with pytest.raises(InvalidToken, match="revoked"):
            opened.authenticate(token)
        with pytest.raises(Unauthorized, match="invalid api key"):
            opened.authenticate(key)
        assert opened.authenticate(kept).name == "alice"


def test_a_configured_key_cannot_be_revoked(tenants: Tenants) -> None:
    tenants.accept("alice", "tml-configured")
    with pytest.raises(Forbidden, match="configuration"):
        tenants.revoke(tenants.key("tml-configured"))
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
