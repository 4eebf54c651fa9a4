"""What the work of a request ends with."""

from __future__ import annotations

from collections.abc import Awaitable

import structlog

from tuft.errors import EngineDied, ServerError, TuftError
from tuft.records import Outcome
from tuft.types import Failure, Float32Array, FutureResult, LossResult, Matrix, SampleResult, TokenLogprobs

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


def size_bytes(result: Settlement) -> int:
    """Of its arrays."""
    match result:
        case LossResult():
            return sum(logprobs.nbytes for logprobs in result.logprobs)
        case SampleResult():
            arrays: list[Float32Array | TokenLogprobs | Matrix | None] = [
                result.prompt_logprobs_P,
                result.topk_prompt,
                result.target_prompt_logprobs,
                result.prompt_alternatives,
                *(sequence.topk for sequence in result.sequences),
            ]
            return sum(array.nbytes for array in arrays if array is not None) + sum(
                sequence.tokens_N.nbytes + sequence.logprobs_N.nbytes for sequence in result.sequences
            )
        case _:
            return 0


def outcome_of(result: Settlement) -> Outcome:
    """Its short form in the journal."""
    if isinstance(result, Failure):
        return "spent" if result.is_spent else "failed"
    return "ok"
