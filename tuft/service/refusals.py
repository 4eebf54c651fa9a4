"""Operations of runs that a quota refused, whose clients try again: until they give up, a run waits for them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tuft.errors import TuftError
from tuft.records import Run, Tenant

GIVEN_UP_AFTER_S = 120.0
"""The SDK tries again within half a minute."""


@dataclass(slots=True)
class Refused:
    tenant: Tenant
    run: Run
    seq: int
    error: TuftError
    at_s: float


class Refusals:
    """By run and seq."""

    def __init__(self) -> None:
        self._refused: dict[tuple[str, int], Refused] = {}

    def note(self, tenant: Tenant, run: Run, seq: int, error: TuftError) -> None:
        self._refused[run.run_id, seq] = Refused(tenant, run, seq, error, time.monotonic())

    def forget(self, run_id: str, seq: int) -> None:
        """It was accepted."""
        self._refused.pop((run_id, seq), None)

    def given_up(self) -> list[Refused]:
        """Those that no one has come back with. Their clients count on, so each must have its turn, as an error."""
        moment_s = time.monotonic()
        return [one for one in self._refused.values() if moment_s - one.at_s >= GIVEN_UP_AFTER_S]
