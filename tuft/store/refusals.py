"""What it means that a database refused, and what helps."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DataError, DBAPIError, OperationalError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tuft.errors import InvalidInput, StorageError

_BACKUP = "stop the server and restore a backup"
MEND_SQLITE = (
    "Restore a backup of the file; or save what can be read with `sqlite3 FILE .recover`; or move it away, with the "
    "files -wal and -shm beside it, to begin anew: checkpoints stay on the disk"
)

# By the beginning of SQLite's error name; the first that fits.
_SQLITE = {
    "SQLITE_FULL": "its disk is full; free some space",
    "SQLITE_IOERR": "its disk failed to read or write; look at the disk",
    "SQLITE_READONLY": "it is read-only; make its file, directory and disk writable",
    "SQLITE_BUSY": "another process keeps it locked; end that one",
    "SQLITE_LOCKED": "another process keeps it locked; end that one",
    "SQLITE_CORRUPT": f"its file is damaged; {_BACKUP}",
    "SQLITE_NOTADB": f"its file is damaged or no database; {_BACKUP}",
    "SQLITE_CANTOPEN": "its file cannot be opened; look at its directory and the rights to it",
}
# By the beginning of PostgreSQL's SQLSTATE; the first that fits.
_POSTGRES = {
    "08": "the connection to it broke; is it running?",
    "25006": "it is read-only: a standby, perhaps; give the primary in database_url",
    "28": "it does not accept the user or password of database_url",
    "3D000": "it does not exist; make it with createdb",
    "40": "another transaction was in the way",
    "42501": "the user of database_url lacks a right to it",
    "53100": "its disk is full; free some space",
    "53300": "it has too many connections; raise its max_connections",
    "53": "it is short of memory or disk",
    "55P03": "another transaction keeps it locked; end that one",
    "57014": "a statement took too long; another transaction keeps it locked, or its disk is slow",
    "57P": "it is being shut down or started",
    "58": "its disk failed to read or write; look at the disk",
    "XX001": f"its files are damaged; {_BACKUP}",
    "XX002": f"its files are damaged; {_BACKUP}",
}


def refusal(error: SQLAlchemyError) -> StorageError | InvalidInput:
    """``error`` in words that are fit for a tenant's eyes: no statement, no value, no path, no host."""
    if isinstance(error, DataError):
        return unstorable(error.orig or error)
    if isinstance(error, StatementError) and isinstance(error.orig, (ValueError, OverflowError)):
        return unstorable(error.orig)
    return StorageError(f"the database refused: {reason(error)}")


def unstorable(cause: BaseException) -> InvalidInput:
    """A value came through that no database keeps: a NUL character, half a surrogate pair, a number of 70 bits."""
    return InvalidInput("request", _first_line(cause), "its texts and numbers must be such as a database keeps")


def reason(error: SQLAlchemyError) -> str:
    """What is wrong, and what helps, without a full stop."""
    if isinstance(error, PoolTimeout):
        return "all connections to it are in use; it is slow, or locked by another process"
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error):
        name = getattr(cause, "sqlite_errorname", None) or ""
        return next((text for start, text in _SQLITE.items() if name.startswith(start)), name or "of an error")
    state = getattr(cause, "sqlstate", None) or ""
    if state:
        return next((text for start, text in _POSTGRES.items() if state.startswith(start)), f"SQLSTATE {state}")
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return _POSTGRES["08"]
    return _unreachable(str(cause)) if isinstance(error, OperationalError) else type(cause or error).__name__


def is_damage(error: SQLAlchemyError) -> bool:
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", None) or ""
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def detail(error: SQLAlchemyError) -> str:
    """The database's own words, for the operator."""
    return _first_line(getattr(error, "orig", None) or error)


def _unreachable(words: str) -> str:
    """psycopg gives no SQLSTATE where no connection came about; only libpq's words tell why."""
    for part, state in (("password", "28"), ("does not exist", "3D000"), ("starting up", "57P"), ("too many", "53300")):
        if part in words:
            return _POSTGRES[state]
    return "it cannot be reached; is it running?"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
