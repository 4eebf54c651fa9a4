"""Who is asking: API keys, kept as hashes only, the tokens made from them, and the tenants they belong to."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from secrets import token_hex, token_urlsafe

import jwt

from tuft.config import ALL_SCOPES, API_KEY_PREFIX, USER_SCOPES, Scope
from tuft.errors import Forbidden, InvalidInput, InvalidToken, NotFound, StorageError, Unauthorized
from tuft.records import ApiKey, Operator, Tenant, TenantSummary, now, valid_name
from tuft.service.audit import Audit, entry_of
from tuft.store.audit import NewEntry
from tuft.store.tenants import TenantCatalog

DEFAULT_TENANT = "default"
ORGANIZATION = "tuft"
"""All tenants of a server are of one organization, as the API sees it."""
SERVER = Operator("server")
"""Who did what nobody asked for by name: the first key of a home, the tenants of configured keys."""
DEFAULT_GRACE_S = 24 * 3600.0
"""How long a key that was rotated is good beside the new one."""
_TOKEN_LIFETIME_S = 24 * 3600
_MAX_LIFETIME_S = 100 * 365 * 24 * 3600.0
_MAX_NAME = 64
_JWT_PREFIX = "eyJ"  # the base64 of '{"'
_JWT_ALGORITHM = "HS256"
_ISSUER = "passport-tuft"  # the SDK takes tokens of a "passport-" for ones that tell who holds them
_READ_EVERY_S = 0.5
_WRITE_EVERY_S = 60.0
_NOTE_EVERY_S = 3600.0

Told = Mapping[str, str | int | None]
By = ApiKey | Operator
"""Who changes tenants and keys: whoever has an admin's key, or the machine's own operator."""


class Tenants:
    """Keys made here are random (256 bits): one unsalted hash is enough, a key is found by its hash alone, and how long
    that takes says nothing of the key. Keys of the configuration may be weak: each is compared in constant time, by a
    hash that says nothing without ``secret``, since tokens carry it.

    What is known of a key is read from the database again after half a second, so that a key which another process
    revokes (`tuft key revoke` beside the server) is refused within that time. Nothing is written while somebody waits.
    """

    def __init__(self, catalog: TenantCatalog, audit: Audit, secret: bytes) -> None:
        self._catalog = catalog
        self._audit = audit
        self._secret = hmac.digest(secret, b"keys and tokens", hashlib.sha256)
        self._configured: dict[str, ApiKey] = {}  # by the key's id
        self._known: dict[str, tuple[ApiKey, float]] = {}  # by the key's id: as it was read, and when
        self._used: dict[str, datetime] = {}  # since the last flush
        self._next_flush_s = 0.0
        self._refused: dict[tuple[str, str], ApiKey] = {}  # since the last sweep, by the key's id and the reason
        self._noted_s: dict[tuple[str, str], float] = {}
        self.num_refused: Counter[str] = Counter()
        """Since the start, by reason. What was sent is kept nowhere."""

    # --- who calls ----------------------------------------------------------------------------------------------------

    def authenticate(self, credential: str | None) -> Tenant:
        """The tenant who holds the API key, or the token made from one; raises what ``key`` raises."""
        return self.key(credential).caller

    def key(self, credential: str | None) -> ApiKey:
        """The API key itself, or the one that the token was made from.

        Raises Unauthorized, which says what to look at, and Forbidden if the tenant is suspended.
        """
        if not credential:
            self.num_refused["no key"] += 1
            raise Unauthorized("no API key: send it as X-API-Key; `tuft key create --tenant NAME` makes one")
        is_token = credential.startswith(_JWT_PREFIX)
        key = self._read(self._id_in_token(credential) if is_token else self._id_of(credential))
        if key is None:
            self.num_refused["unknown"] += 1
            if is_token:
                raise InvalidToken("this server no longer knows the API key that this JWT was made from")
            raise _unknown(credential)
        moment = now()
        state = key.state(moment)
        if state == "valid":
            self._used[key.key_id] = moment
            return key
        self._refuse(key, state)
        if state == "suspended":
            raise Forbidden(f"the tenant {key.tenant.name!r} is suspended; who runs this server can resume it")
        ended = "was revoked" if state == "revoked" else f"expired at {key.expires_at:%Y-%m-%d %H:%M} UTC"
        if is_token:
            raise InvalidToken(f"the API key that this JWT was made from {ended}")
        raise Unauthorized(f"invalid api key (…{key.hint}): it {ended}; `tuft key create` makes another")

    def require(self, key: ApiKey, scope: Scope, purpose: str) -> None:
        """Raises Forbidden, which names the scope needed for the purpose and those of the key, if it lacks it."""
        if scope not in key.scopes:
            self._refuse(key, f"scope {scope}")
            raise Forbidden(
                f"{purpose} needs an API key of scope {scope!r}; this one (…{key.hint}) has {', '.join(key.scopes)}"
            )

    def token(self, key: ApiKey) -> str:
        """A JWT that stands for the key: it tells whose it is, and ends with the key."""
        issued_at = int(time.time())
        ends_at = issued_at + _TOKEN_LIFETIME_S
        if key.expires_at is not None:
            ends_at = min(ends_at, math.ceil(key.expires_at.timestamp()))
        who = {"sub": key.tenant.urn, "org_id": ORGANIZATION, "email": ""}
        claims = {"iss": _ISSUER, **who, "iat": issued_at, "exp": ends_at, "key": key.key_id}
        return jwt.encode(claims, self._secret, _JWT_ALGORITHM)

    def accept(self, tenant_name: str, key: str, scopes: Sequence[Scope] = USER_SCOPES) -> None:
        """Accept ``key``, which the configuration or the environment gives, as long as this server runs."""
        if not key.startswith(API_KEY_PREFIX):
            raise InvalidInput("key", f"…{key[-4:]}", f"must start with {API_KEY_PREFIX!r}: the SDK refuses other keys")
        key_id = self._keyed_hash(key)
        tenant = self.ensure(tenant_name, SERVER)
        self._configured[key_id] = ApiKey(key_id, tenant, key[-4:], None, scopes=_scopes(scopes))

    def stored(self, key: str) -> ApiKey:
        """What the database has of the key, whether it still opens the door or not. Raises NotFound."""
        found = self._catalog.key(key_id_of(key))
        if found is None:
            raise NotFound(f"key: …{key[-4:]} is none that was made here")
        return found

    def knows(self, key: str) -> bool:
        """Whether the database has the key, and it opens the door."""
        found = self._catalog.key(key_id_of(key))
        return found is not None and found.state(now()) == "valid"

    def has_keys(self) -> bool:
        return self._catalog.has_valid_keys()

    # --- keys ---------------------------------------------------------------------------------------------------------

    def create_key(
        self,
        tenant_name: str,
        name: str = "",
        scopes: Sequence[Scope] = USER_SCOPES,
        lifetime_s: float | None = None,
        by: By = SERVER,
    ) -> str:
        """A new key for the tenant of that name, who is made if unknown; without ``lifetime_s`` it does not expire. It
        is returned here and never again. Raises InvalidInput."""
        _check(name, scopes, lifetime_s)
        secret, key = _made(self.ensure(tenant_name, by), name, scopes, lifetime_s)
        self._catalog.add_key(key, _entry(by, "key_create", key.tenant, _told_new(key)))
        return secret

    def find_key(self, number: int) -> ApiKey:
        """The key that the API calls by that number. Raises NotFound."""
        configured = next((key for key in self._configured.values() if key.number == number), None)
        key = configured or self._catalog.numbered(number)
        if key is None:
            raise NotFound(f"key: {number} is unknown; `tuft key list` shows all")
        return key

    def keys(self, tenant_name: str | None, limit: int, offset: int) -> tuple[list[ApiKey], int]:
        """One page of the tenant's keys or of all, those that ended too, and the number of all; without those that the
        configuration gives. Raises NotFound."""
        tenant = None if tenant_name is None else self.named(tenant_name)
        return self._catalog.keys(tenant, limit, offset)

    @property
    def configured_keys(self) -> Sequence[ApiKey]:
        return tuple(self._configured.values())

    def revoke(self, key: ApiKey, by: By) -> None:
        """From now on nobody is let in with the key. Raises Forbidden for one that the configuration gives."""
        self._must_be_stored(key)
        self._catalog.revoke_key(key.key_id, now(), _entry(by, "key_revoke", key.tenant, _told(key)))
        self._known.clear()

    def rotate(self, key: ApiKey, grace_s: float, by: By) -> str:
        """A new key in the place of ``key``, which is good for ``grace_s`` seconds more: same tenant, name and scopes,
        and as long a life. Raises Forbidden for one that the configuration gives, InvalidInput for one that ended."""
        self._must_be_stored(key)
        if not 0 <= grace_s <= _MAX_LIFETIME_S:
            raise InvalidInput("grace_s", grace_s, f"must be 0 to {_MAX_LIFETIME_S:.0f} seconds")
        moment = now()
        if (state := key.state(moment)) in ("revoked", "expired"):
            raise InvalidInput("key", key.number, f"is {state}: create another")
        assert key.created_at is not None
        lifetime = None if key.expires_at is None else (key.expires_at - key.created_at).total_seconds()
        secret, new = _made(key.tenant, key.name, key.scopes, lifetime)
        told = {**_told_new(new), "replaces": key.number}
        ends_at = moment + timedelta(seconds=grace_s)
        self._catalog.replace_key(key.key_id, ends_at, new, _entry(by, "key_rotate", key.tenant, told))
        self._known.clear()
        return secret

    # --- tenants ------------------------------------------------------------------------------------------------------

    def named(self, name: str) -> Tenant:
        """Raises NotFound."""
        tenant = self._catalog.named(name)
        if tenant is None:
            raise NotFound(f"tenant: {name!r} is unknown; `tuft tenant list` shows all")
        return tenant

    def tenants(self, limit: int, offset: int) -> tuple[list[TenantSummary], int]:
        """One page by name, and the number of all."""
        return self._catalog.tenants(limit, offset)

    def create_tenant(self, name: str, by: By) -> Tenant:
        """Raises InvalidInput if the name is taken or can be none."""
        if self._catalog.named(_name(name, "tenant")) is not None:
            raise InvalidInput("tenant", name, "exists already")
        return self.ensure(name, by)

    def suspend(self, name: str, by: By) -> None:
        """Nobody is let in with the tenant's keys; its work that was accepted ends, and what it stored stays. Raises
        NotFound, and Forbidden for the tenant whose key asks: nobody could undo it."""
        tenant = self.named(name)
        if isinstance(by, ApiKey) and by.tenant == tenant:
            raise Forbidden(f"tenant: {name!r} is your own; `tuft tenant suspend` on the server's machine can do it")
        self._catalog.set_suspended(tenant, now(), _entry(by, "tenant_suspend", tenant))
        self._known.clear()

    def resume(self, name: str, by: By) -> None:
        """Raises NotFound."""
        tenant = self.named(name)
        self._catalog.set_suspended(tenant, None, _entry(by, "tenant_resume", tenant))
        self._known.clear()

    # --- housekeeping -------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Note which keys were refused and why, once an hour each, and now and then when keys were used."""
        moment_s = time.monotonic()
        for (key_id, reason), key in list(self._refused.items()):
            if moment_s >= self._noted_s.get((key_id, reason), 0.0):
                note = partial(self._audit.note, key.tenant, "key_refuse", key.tenant.tenant_id)
                await asyncio.to_thread(note, **_told(key), reason=reason)
                self._noted_s[key_id, reason] = moment_s + _NOTE_EVERY_S
            del self._refused[key_id, reason]  # not before it is written: the database may refuse today
        if moment_s >= self._next_flush_s:
            await self.flush()
            self._next_flush_s = moment_s + _WRITE_EVERY_S

    async def flush(self) -> None:
        """Write when each key was used last."""
        used, self._used = self._used, {}
        stored = {key_id: moment for key_id, moment in used.items() if key_id not in self._configured}
        try:
            if stored:
                await asyncio.to_thread(self._catalog.note_use, stored)
        except StorageError:
            self._used = {**used, **self._used}
            raise

    # ------------------------------------------------------------------------------------------------------------------

    def _refuse(self, key: ApiKey, reason: str) -> None:
        self.num_refused[reason] += 1
        self._refused[key.key_id, reason] = key

    def _id_of(self, key: str) -> str:
        """Of a configured key its keyed hash, of any other its plain one."""
        keyed = self._keyed_hash(key)
        same = [key_id for key_id in self._configured if hmac.compare_digest(key_id, keyed)]
        return same[0] if same else key_id_of(key)

    def _id_in_token(self, token: str) -> str:
        try:
            claims = jwt.decode(token, self._secret, [_JWT_ALGORITHM], {"require": ["exp", "key"]})
        except jwt.ExpiredSignatureError as error:
            self.num_refused["token"] += 1
            raise InvalidToken("this JWT has expired; POST /api/v1/auth/token makes another") from error
        except jwt.InvalidTokenError as error:
            self.num_refused["token"] += 1
            raise InvalidToken("this JWT was not made by this server") from error
        return str(claims["key"])

    def _read(self, key_id: str) -> ApiKey | None:
        """What the database says of the key, or said less than half a second ago."""
        known = self._known.get(key_id)
        moment_s = time.monotonic()
        if known is not None and moment_s < known[1] + _READ_EVERY_S:
            return known[0]
        configured = self._configured.get(key_id)
        if configured is None:
            key = self._catalog.key(key_id)
        else:
            key = replace(configured, suspended=self._catalog.is_suspended(configured.tenant))
        if key is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = key, moment_s
        return key

    def _keyed_hash(self, key: str) -> str:
        return hmac.digest(self._secret, _bytes(key), hashlib.sha256).hex()

    def _must_be_stored(self, key: ApiKey) -> None:
        if key.key_id in self._configured:
            raise Forbidden("this API key is given by the server's configuration; it ends when it is taken out there")

    def ensure(self, name: str, by: By) -> Tenant:
        """The tenant of that name, who is made if unknown."""
        tenant = Tenant(f"tenant-{token_hex(8)}", _name(name, "tenant"))
        return self._catalog.ensure_tenant(tenant, _entry(by, "tenant_create", tenant))[0]


def _unknown(credential: str) -> Unauthorized:
    return Unauthorized(
        f"invalid api key (the one received ends in …{credential[-4:]}): this server does not know it. "
        "SDKs up to 0.16.1 prefer TINKER_API_KEY over api_key=, newer ones the argument; "
        "`tuft key create --tenant NAME` on the server's machine makes a key"
    )


def _check(name: str, scopes: Sequence[Scope], lifetime_s: float | None) -> None:
    if name:
        _name(name, "name")
    if not scopes or not set(scopes) <= set(ALL_SCOPES):
        raise InvalidInput("scopes", list(scopes), f"must be some of {', '.join(ALL_SCOPES)}")
    if lifetime_s is not None and not 0 < lifetime_s <= _MAX_LIFETIME_S:
        raise InvalidInput("lifetime_s", lifetime_s, f"must be above 0, at most {_MAX_LIFETIME_S:.0f} seconds")


def _name(name: str, field: str) -> str:
    if len(valid_name(name, field)) > _MAX_NAME:
        raise InvalidInput(field, name, f"must be at most {_MAX_NAME} characters")
    return name


def _scopes(scopes: Sequence[Scope]) -> tuple[Scope, ...]:
    """Each once, in the order in which they are always shown."""
    return tuple(scope for scope in ALL_SCOPES if scope in scopes)


def _made(tenant: Tenant, name: str, scopes: Sequence[Scope], lifetime_s: float | None) -> tuple[str, ApiKey]:
    """A new key, and what is kept of it."""
    secret = API_KEY_PREFIX + token_urlsafe(32)
    moment = now()
    expires_at = None if lifetime_s is None else moment + timedelta(seconds=lifetime_s)
    return secret, ApiKey(key_id_of(secret), tenant, secret[-4:], moment, name, _scopes(scopes), expires_at)


def _entry(by: By, event: str, tenant: Tenant, told: Told | None = None) -> NewEntry:
    details: Told = {**(told or {}), "tenant": tenant.name}
    if isinstance(by, ApiKey):
        return entry_of(by.tenant, event, tenant.tenant_id, {**details, "by_key": by.number})
    return entry_of(by, event, tenant.tenant_id, details)


def _told_new(key: ApiKey) -> Told:
    return {**_told(key), "scopes": " ".join(key.scopes)}


def _told(key: ApiKey) -> Told:
    """What the audit log says of a key."""
    told: Told = {"key_number": key.number, "hint": f"…{key.hint}"}
    return {**told, "key_name": key.name} if key.name else told


def key_id_of(key: str) -> str:
    """Of a key that was made here."""
    return hashlib.sha256(_bytes(key)).hexdigest()


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
