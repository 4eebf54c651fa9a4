"""Who is asking: API keys, kept as SHA-256 only, and the tenants they belong to."""

from __future__ import annotations

import hashlib
from secrets import token_hex, token_urlsafe

from tuft.config import API_KEY_PREFIX
from tuft.errors import InvalidInput, Unauthorized
from tuft.records import Tenant, valid_name
from tuft.store.catalog import Catalog

DEFAULT_TENANT = "default"


class Tenants:
    """Keys are random (256 bits), so that one unsalted hash is enough and a key is found by its hash alone."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[str, Tenant] = {}  # by the key's hash: the configured ones, and those who have called

    def authenticate(self, api_key: str | None) -> Tenant:
        """The tenant that holds ``api_key``; raises Unauthorized, which says what to look at."""
        if not api_key:
            raise Unauthorized("no API key: send it as X-API-Key; `tuft key create --tenant NAME` makes one")
        key_hash = _hash(api_key)
        tenant = self._known.get(key_hash) or self._catalog.tenant_of_key(key_hash)
        if tenant is None:
            raise Unauthorized(
                f"invalid api key (the one received ends in …{api_key[-4:]}): this server does not know it. "
                "SDKs up to 0.16.1 prefer TINKER_API_KEY over api_key=, newer ones the argument; "
                "`tuft key create --tenant NAME` on the server's machine makes a key"
            )
        self._known[key_hash] = tenant  # a key is never taken back
        return tenant

    def create_key(self, tenant_name: str) -> str:
        """A new key for the tenant of that name, who is made if unknown. It is returned here and never again."""
        key = API_KEY_PREFIX + token_urlsafe(32)
        self._catalog.add_key(self._tenant(tenant_name), _hash(key), key[-4:])
        return key

    def accept(self, tenant_name: str, key: str) -> None:
        """Accept ``key``, which the configuration or the environment gives, as long as this server runs."""
        if not key.startswith(API_KEY_PREFIX):
            raise InvalidInput("key", f"…{key[-4:]}", f"must start with {API_KEY_PREFIX!r}: the SDK refuses other keys")
        self._known[_hash(key)] = self._tenant(tenant_name)

    def knows(self, key: str) -> bool:
        return self._catalog.tenant_of_key(_hash(key)) is not None

    def has_keys(self) -> bool:
        return self._catalog.has_keys()

    def _tenant(self, name: str) -> Tenant:
        """The tenant of that name, who is made if unknown."""
        return self._catalog.ensure_tenant(Tenant(f"tenant-{token_hex(8)}", valid_name(name, "tenant")))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
