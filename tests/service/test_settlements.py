from __future__ import annotations

import pytest

from tuft.errors import EngineDied, InvalidInput
from tuft.service.settlements import outcome
from tuft.types import Failure, FutureResult


async def raising(error: Exception) -> FutureResult:
    raise error


async def test_errors_become_failures_of_their_category() -> None:
    assert await outcome(raising(InvalidInput("rank", 0, "must be 1 to 8"))) == Failure(
        "rank: got 0; must be 1 to 8", "user"
    )


async def test_a_bug_is_named_by_its_class_alone() -> None:
    failed = await outcome(raising(ZeroDivisionError("a secret")))
    assert isinstance(failed, Failure)
    assert failed.category == "server"
    assert "ZeroDivisionError" in failed.message
    assert "secret" not in failed.message


async def test_the_engines_death_is_no_outcome() -> None:
    with pytest.raises(EngineDied):
        await outcome(raising(EngineDied("gone")))
