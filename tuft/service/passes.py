"""Which passes are with the engine: a pure decision, like the queue's.

Two are: one that it computes and one that waits there, so that it never waits for us. No more than that is decided
ahead, and the waiting one is topped up while it waits. One thing goes before the pass that waits: losses of tenants who
are behind those in it, since they came back after it was sent. So who has sent nothing for a while waits for no more
than what is left of one pass, and for others who came back like this; the credit of ``tuft.fairness`` bounds how often.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuft.engine.base import RunLoss
from tuft.service.forecast import Rate
from tuft.service.queue import MayStart, OperationQueue, Part

MAX_PASSES = 2


@dataclass(slots=True, eq=False)
class Pass:
    """Parts of losses that are with the engine; over when all are answered. ``level``: of the tenant who was behind
    most when it was made up; ``cost``: what its parts were charged."""

    level: float
    num_rows: int = 0
    num_unanswered: int = 0
    cost: float = 0.0
    sent_s: float = 0.0


class EnginePasses:
    """In the order in which the engine computes them. Times in seconds of any clock that only grows."""

    def __init__(self, queue: OperationQueue) -> None:
        self._queue = queue
        self._passes: list[Pass] = []
        self._last_end_s = 0.0
        self.rate = Rate()  # cost that the engine trains a second, sampling in between included

    def next(self, may_start: MayStart, now_s: float) -> tuple[list[Part], Pass | None]:
        """What to send now, and the pass that its losses belong to; no parts if that is all for now."""
        pass_tokens = self._queue.pass_tokens
        if len(self._passes) < MAX_PASSES:
            return self._filled(None, self._queue.take(pass_tokens, may_start), now_s)
        last = self._passes[-1]
        between = self._passes[1] if len(self._passes) > MAX_PASSES else None
        free_rows = pass_tokens - (0 if between is None else between.num_rows)
        parts = self._queue.take(free_rows, may_start, below=last.level)
        if parts:
            parts = [_ahead(part) for part in parts]
            return self._filled(between, parts, now_s, len(self._passes) - 1)
        return self._filled(last, self._queue.take(pass_tokens - last.num_rows, may_start), now_s)

    def answered(self, one: Pass, now_s: float) -> None:
        """One part of it is."""
        one.num_unanswered -= 1
        if not one.num_unanswered:
            self._passes.remove(one)
            self.rate.observe(one.cost, now_s - max(one.sent_s, self._last_end_s))
            self._last_end_s = now_s

    @property
    def num_with_engine(self) -> int:
        return len(self._passes)

    def remaining_cost(self, now_s: float) -> float:
        """What the engine has still to compute of all passes, about."""
        if not self._passes:
            return 0.0
        first = self._passes[0]
        done = (self.rate.value or 0.0) * (now_s - max(first.sent_s, self._last_end_s))
        return max(0.0, first.cost - done) + sum(one.cost for one in self._passes[1:])

    def _filled(
        self, filling: Pass | None, parts: list[Part], now_s: float, place: int | None = None
    ) -> tuple[list[Part], Pass | None]:
        losses = [part for part in parts if isinstance(part.work, RunLoss)]
        if not losses:
            return parts, None
        if filling is None:
            filling = Pass(min(part.level for part in losses), sent_s=now_s)
            self._passes.insert(len(self._passes) if place is None else place, filling)
        filling.num_rows += sum(part.num_rows for part in losses)
        filling.num_unanswered += len(losses)
        filling.cost += sum(self._queue.cost(part) for part in losses)
        return parts, filling


def _ahead(part: Part) -> Part:
    return replace(part, work=replace(part.work, ahead=True)) if isinstance(part.work, RunLoss) else part
