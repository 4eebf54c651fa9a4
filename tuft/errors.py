"""Every error that TuFT raises on purpose.

    TuftError
    ├── UserError                 the request cannot be honoured; the caller can mend it
    │   ├── InvalidInput          a field's value is wrong: names field, value seen, values allowed
    │   ├── Unauthorized          no key, or one that is unknown or has ended
    │   │   └── InvalidToken      a JWT that is forged, has expired, or outlived its key: a new one may do
    │   ├── Forbidden             the caller may not: a scope their key lacks, a suspended tenant
    │   ├── NotFound              no such object among the caller's own
    │   ├── Gone                  a future that is unknown, or no longer kept
    │   ├── TooLarge              a request body over the limit
    │   ├── SeqReused             a seq that another request had before: a retry must repeat what it retries
    │   ├── QuotaExceeded         the tenant or the key has as much at once as it may; later is fine
    │   │   └── CapReached        as much as it may in all, or until a date: its work waits for that, or for a raise
    │   └── RunLost               the run's live state is gone; names what can be loaded instead
    └── ServerError               the server could not do its part
        ├── ConfigError           the configuration cannot be honoured
        ├── ModelError            a base model cannot be found, read or computed
        ├── EngineError           a computation failed
        │   └── EngineDied        the engine process ended while it held this work
        ├── StorageError          the disk or the database refused
        │   └── Damaged           what was saved is not what is there now: another checkpoint may be whole
        └── Overloaded            other requests hold what this one needs; soon is fine

``category`` is what the wire calls it (``user`` or ``server``); ``api.http`` alone turns a class into
a status code.
"""

from __future__ import annotations

import reprlib
from typing import ClassVar, TypeVar

from tuft import scrub


class TuftError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is fit for the caller's eyes."""

    category: ClassVar[str] = "server"
    refused: tuple[str, str] | None = None
    """What was asked for and not found: its kind, and its id. See ``refusing``."""

    @property
    def told(self) -> str:
        """What its caller reads: without keys, not without end, and what is no error of theirs without the paths of
        this machine."""
        text = scrub.without_keys(str(self))
        return scrub.short(text if self.category == "user" else scrub.without_paths(text))


E = TypeVar("E", bound=TuftError)


def refusing(kind: str, named: str, error: E) -> E:
    """``error``, raised because nothing of that id is the caller's: nobody's is, or it is another tenant's. The caller
    must not learn which; ``service.ownership`` finds out later."""
    error.refused = (kind, named)
    return error


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


class SeqReused(UserError):
    pass


class QuotaExceeded(UserError):
    """``retry_after_s``: when it is worth trying again, in seconds; None if the quota does not say."""

    def __init__(self, message: str = "", retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, retry_after_s)  # both, so that it survives pickling

    def __str__(self) -> str:
        return str(self.args[0])


class CapReached(QuotaExceeded):
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


class Damaged(StorageError):
    pass


class Overloaded(ServerError):
    pass
