"""Every error that TuFT raises on purpose.

    TuftError
    ├── UserError                 the request cannot be honoured; the caller can mend it
    │   ├── InvalidInput          a field's value is wrong: names field, value seen, values allowed
    │   ├── Unauthorized          no key, or a key that is unknown
    │   │   └── InvalidToken      a JWT that is forged, has expired, or outlived its key: a new one may do
    │   ├── Forbidden             the caller may not: a project they are no member of, a key they cannot revoke
    │   ├── NotFound              no such object among the caller's own
    │   ├── Gone                  a future that is unknown, or no longer kept
    │   ├── TooLarge              a request body over the limit
    │   ├── QuotaExceeded         the tenant has as much at once as it may; later is fine
    │   └── RunLost               the run's live state is gone; names what can be loaded instead
    └── ServerError               the server could not do its part
        ├── ConfigError           the configuration cannot be honoured
        ├── ModelError            a base model cannot be found, read or computed
        ├── EngineError           a computation failed
        │   └── EngineDied        the engine process ended while it held this work
        └── StorageError          the disk or the database refused, or holds something damaged

``category`` is what the wire calls it (``user`` or ``server``); ``api.http`` alone turns a class into
a status code.
"""

from __future__ import annotations

import reprlib
from typing import ClassVar


class TuftError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is fit for the caller's eyes."""

    category: ClassVar[str] = "server"


class UserError(TuftError):
    category = "user"


class InvalidInput(UserError):
    """A field's value is not allowed.

    ``str()`` reads ``<field>: got <value>; <allowed>``, e.g. ``lora_config.rank: got 0; must be 1 to 256``.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(field, value, allowed)  # all three, so that it survives pickling

    def __str__(self) -> str:
        shown = _BRIEF.repr(self.value)
        if len(shown) > _MAX_SHOWN:
            shown = shown[: _MAX_SHOWN - 3] + "..."
        return f"{self.field}: got {shown}; {self.allowed}"


_MAX_SHOWN = 120


class _Brief(reprlib.Repr):
    """The beginning of a value's ``repr``, without making the rest: a client may send millions of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxlong = 4, 10**4, 10**4
        self.maxlist = self.maxtuple = self.maxdict = _MAX_SHOWN

    def repr_str(self, x: str, _level: int) -> str:
        return repr(x[:_MAX_SHOWN])


_BRIEF = _Brief()


class Unauthorized(UserError):
    pass


class InvalidToken(Unauthorized):
    pass


class Forbidden(UserError):
    pass


class NotFound(UserError):
    pass


class Gone(UserError):
    pass


class TooLarge(UserError):
    pass


class QuotaExceeded(UserError):
    pass


class RunLost(UserError):
    pass


class ServerError(TuftError):
    pass


class ConfigError(ServerError):
    pass


class ModelError(ServerError):
    pass


class EngineError(ServerError):
    pass


class EngineDied(EngineError):
    pass


class StorageError(ServerError):
    pass
