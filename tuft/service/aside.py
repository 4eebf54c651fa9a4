"""Runs that engines die of while they are restored: each further try waits longer, and after the last the run is set
aside until it is given another state, or the server starts again."""

from __future__ import annotations

from collections import Counter

import structlog

from tuft.service.scheduler import HOW_TO_GO_ON

log = structlog.get_logger(__name__)

MAX_DEATHS = 3
_PAUSE_S, _PAUSE_GROWS = 0.5, 4.0


class Aside:
    """Counts deaths of engines, by run."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()

    def died(self, run_id: str) -> float:
        """An engine died while it computed the run anew. Returns for how many seconds to leave it alone."""
        self._deaths[run_id] += 1
        num_deaths = self._deaths[run_id]
        log.error("the engine died while a run was brought back", run=run_id, deaths=num_deaths, at_most=MAX_DEATHS)
        return 0.0 if num_deaths >= MAX_DEATHS else _PAUSE_S * _PAUSE_GROWS ** (num_deaths - 1)

    def is_suspect(self, run_id: str) -> bool:
        """True if nothing else should be with the engine at the next try."""
        return self._deaths[run_id] > 0

    def reason(self, run_id: str) -> str | None:
        """Why the run's operations fail; None unless it is set aside."""
        if self._deaths[run_id] < MAX_DEATHS:
            return None
        return (
            f"run {run_id} is set aside: the engine died {self._deaths[run_id]} times while it computed the run's last "
            "operations again, which had worked once. Call load_state(path) on it with one of its checkpoints, or "
            f"{HOW_TO_GO_ON}. The server tries it again when it is restarted"
        )

    def forget(self, run_id: str) -> None:
        """It is in the engine, or has ended."""
        self._deaths.pop(run_id, None)
