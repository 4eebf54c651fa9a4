from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tuft.errors import InvalidInput, Unauthorized
from tuft.service.tenants import Tenants
from tuft.store.catalog import Catalog
from tuft.store.db import open_database, sqlite_url


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    database = open_database(sqlite_url(tmp_path))
    yield Catalog(database)
    database.close()


def test_a_key_finds_its_tenant_and_a_second_key_the_same_one(catalog: Catalog) -> None:
    tenants = Tenants(catalog)
    first, second = tenants.create_key("alice"), tenants.create_key("alice")
    assert first != second
    assert first.startswith("tml-")
    assert tenants.authenticate(first) == tenants.authenticate(second)
    assert tenants.authenticate(tenants.create_key("bob")) != tenants.authenticate(first)


def test_only_the_hash_of_a_key_is_kept(catalog: Catalog, tmp_path: Path) -> None:
    key = Tenants(catalog).create_key("alice")
    catalog._database.close()
    assert key.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_an_unknown_key_is_named_by_its_end_alone(catalog: Catalog) -> None:
    with pytest.raises(Unauthorized) as caught:
        Tenants(catalog).authenticate("tml-secret-and-wrong-abcd")
    assert "…abcd" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "TINKER_API_KEY" in str(caught.value)


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_unauthorized(catalog: Catalog, key: str | None) -> None:
    with pytest.raises(Unauthorized, match="X-API-Key"):
        Tenants(catalog).authenticate(key)


def test_a_key_without_the_sdks_prefix_is_refused_and_not_shown(catalog: Catalog) -> None:
    with pytest.raises(InvalidInput, match="tml-") as caught:
        Tenants(catalog).accept("alice", "my-own-long-secret")
    assert "my-own" not in str(caught.value)


def test_a_configured_key_opens_the_door_only_while_it_is_configured(catalog: Catalog) -> None:
    tenants = Tenants(catalog)
    tenants.accept("alice", "tml-configured")
    assert tenants.authenticate("tml-configured") == tenants.authenticate(tenants.create_key("alice"))
    with pytest.raises(Unauthorized):
        Tenants(catalog).authenticate("tml-configured")  # as after a restart without it
