"""Who is asking: API keys, kept as hashes only, the tokens made from them, and the tenants they belong to."""

from __future__ import annotations

import hashlib
import hmac
import time
from secrets import token_hex, token_urlsafe

import jwt

from tuft.config import API_KEY_PREFIX
from tuft.errors import Forbidden, InvalidInput, InvalidToken, Unauthorized
from tuft.records import ApiKey, Tenant, now, valid_name
from tuft.service.audit import Audit
from tuft.store.catalog import Catalog

DEFAULT_TENANT = "default"
ORGANIZATION = "tuft"
"""All tenants of a server are of one organization, as the API sees it."""
_TOKEN_LIFETIME_S = 24 * 3600
_JWT_PREFIX = "eyJ"  # the base64 of '{"'
_JWT_ALGORITHM = "HS256"
_ISSUER = "passport-tuft"  # the SDK takes tokens of a "passport-" for ones that tell who holds them


class Tenants:
    """Keys made here are random (256 bits), so that one unsalted hash is enough and a key is found by its hash alone.
    Keys of the configuration may be weak: the hash of one, which tokens carry, says nothing without ``secret``."""

    def __init__(self, catalog: Catalog, audit: Audit, secret: bytes) -> None:
        self._catalog = catalog
        self._audit = audit
        self._secret = hmac.digest(secret, b"keys and tokens", hashlib.sha256)
        self._configured: dict[str, ApiKey] = {}  # by the key's id
        self._known: dict[str, ApiKey] = {}  # the others that have called

    def authenticate(self, credential: str | None) -> Tenant:
        """The tenant who holds the API key, or the token made from one; raises Unauthorized, which says what to look
        at."""
        return self.key(credential).tenant

    def key(self, credential: str | None) -> ApiKey:
        """The API key itself, or the one that the token was made from. Raises Unauthorized."""
        if not credential:
            raise Unauthorized("no API key: send it as X-API-Key; `tuft key create --tenant NAME` makes one")
        if credential.startswith(_JWT_PREFIX):
            return self._of_token(credential)
        key = self._configured.get(self._configured_id(credential)) or self._of_id(_hash(credential))
        if key is None:
            raise Unauthorized(
                f"invalid api key (the one received ends in …{credential[-4:]}): this server does not know it. "
                "SDKs up to 0.16.1 prefer TINKER_API_KEY over api_key=, newer ones the argument; "
                "`tuft key create --tenant NAME` on the server's machine makes a key"
            )
        return key

    def token(self, key: ApiKey) -> str:
        """A JWT that stands for the key: it tells whose it is, and ends with the key."""
        issued_at = int(time.time())
        who = {"sub": key.tenant.urn, "org_id": ORGANIZATION, "email": ""}
        claims = {"iss": _ISSUER, **who, "iat": issued_at, "exp": issued_at + _TOKEN_LIFETIME_S, "key": key.key_id}
        return jwt.encode(claims, self._secret, _JWT_ALGORITHM)

    def create_key(self, tenant_name: str) -> str:
        """A new key for the tenant of that name, who is made if unknown. It is returned here and never again."""
        key = API_KEY_PREFIX + token_urlsafe(32)
        made = ApiKey(_hash(key), self._tenant(tenant_name), key[-4:], now())
        self._catalog.add_key(made)
        self._note(made, "create")
        return key

    def revoke(self, key: ApiKey) -> None:
        """From now on nobody is let in with the key. Raises Forbidden for one that the configuration gives."""
        if key.key_id in self._configured:
            raise Forbidden("this API key is given by the server's configuration; it ends when it is taken out there")
        self._catalog.delete_key(key.key_id)
        self._known.pop(key.key_id, None)
        self._note(key, "revoke")

    def accept(self, tenant_name: str, key: str) -> None:
        """Accept ``key``, which the configuration or the environment gives, as long as this server runs."""
        if not key.startswith(API_KEY_PREFIX):
            raise InvalidInput("key", f"…{key[-4:]}", f"must start with {API_KEY_PREFIX!r}: the SDK refuses other keys")
        key_id = self._configured_id(key)
        self._configured[key_id] = ApiKey(key_id, self._tenant(tenant_name), key[-4:], None)

    def knows(self, key: str) -> bool:
        return self._catalog.key(_hash(key)) is not None

    def has_keys(self) -> bool:
        return self._catalog.has_keys()

    def _of_token(self, token: str) -> ApiKey:
        try:
            claims = jwt.decode(token, self._secret, [_JWT_ALGORITHM], {"require": ["exp", "key"]})
        except jwt.ExpiredSignatureError as error:
            raise InvalidToken("this JWT has expired; POST /api/v1/auth/token makes another") from error
        except jwt.InvalidTokenError as error:
            raise InvalidToken("this JWT was not made by this server") from error
        key = self._of_id(claims["key"])
        if key is None:
            raise InvalidToken("the API key that this JWT was made from has been revoked")
        return key

    def _of_id(self, key_id: str) -> ApiKey | None:
        key = self._configured.get(key_id) or self._known.get(key_id) or self._catalog.key(key_id)
        if key is not None and key.created_at is not None:
            self._known[key_id] = key
        return key

    def _configured_id(self, key: str) -> str:
        return hmac.digest(self._secret, _bytes(key), hashlib.sha256).hex()

    def _note(self, key: ApiKey, action: str) -> None:
        self._audit.note(key.tenant, f"key_{action}", key_number=key.number, hint=f"…{key.hint}")

    def _tenant(self, name: str) -> Tenant:
        """The tenant of that name, who is made if unknown."""
        return self._catalog.ensure_tenant(Tenant(f"tenant-{token_hex(8)}", valid_name(name, "tenant")))


def _hash(key: str) -> str:
    return hashlib.sha256(_bytes(key)).hexdigest()


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
