"""What the work of a request ends with."""

from __future__ import annotations

from collections.abc import Awaitable

import structlog

from tuft.errors import EngineDied, ServerError, TuftError
from tuft.records import Outcome
from tuft.types import Failure, FutureResult

log = structlog.get_logger(__name__)

Settlement = FutureResult | Failure


async def outcome(work: Awaitable[FutureResult]) -> Settlement:
    """What ``work`` ends with; its errors become a Failure, so that a future always settles. EngineDied passes: the
    work is done again."""
    try:
        return await work
    except EngineDied:
        raise
    except TuftError as error:
        return failure(error)
    except Exception as error:  # the boundary: a bug fails this one operation, never the loop
        log.exception("internal error")
        return failure(ServerError(f"internal error: {type(error).__name__}; the server's log says more"))


def failure(error: TuftError) -> Failure:
    return Failure(error.told, "user" if error.category == "user" else "server", error.refused)


def outcome_of(result: Settlement) -> Outcome:
    """Its short form in the journal."""
    return "failed" if isinstance(result, Failure) else "ok"
