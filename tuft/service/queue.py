"""Which operations run next: a pure decision over plain objects. No clock but the one passed in, no I/O.

Each run is a *lane*: its operations go in the order of their seq. One that comes early is parked until the seqs before
it came. Losses are cut into *parts* that fit a pass; parts of any lanes share passes. An optim_step is sent behind its
lane's losses without waiting for them, since the engine computes in the order in which it is asked. Everything else
(save, load, ...) is a barrier of its own lane: it starts when all before it ended, and nothing of the lane passes it.

Between tenants the order is that of weighted fair queueing: every tenant is owed an equal share of the rows computed
(docs/adr/0007). *Virtual time* is how many rows each of the tenants who want any would have by now if passes could be
divided without end; an operation's ``finish`` is when it would be done in such a world, and the earliest finish goes
first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import count

from tuft.engine.base import OptimStep, RunLoss
from tuft.prefixes import cut
from tuft.types import Failure, FutureResult

Barrier = Callable[[], Awaitable[FutureResult]]
Work = RunLoss | OptimStep | Barrier


@dataclass(slots=True)
class Operation:
    """One queued call of a run. ``error``: what its first failed part ended with."""

    run_id: str
    tenant_id: str
    seq: int
    future_id: str
    work: Work
    error: Failure | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What starts as one: some data of a loss, needing ``num_rows`` rows of a pass, or an operation of another kind."""

    operation: Operation
    work: Work
    num_rows: int = 0

    @property
    def is_last(self) -> bool:
        return not isinstance(self.work, RunLoss) or self.work.is_last


@dataclass(slots=True)
class _Waiting:
    """An operation with parts that have not started, and its place in the fair order."""

    operation: Operation
    parts: deque[Part]
    finish: float = 0.0
    arrival: int = 0

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


@dataclass(slots=True)
class _Lane:
    """``released`` ends with the first barrier that has not ended; ``behind`` is what waits for that."""

    tenant_id: str
    next_seq: int
    released: deque[_Waiting] = field(default_factory=deque)
    behind: deque[_Waiting] = field(default_factory=deque)
    parked: dict[int, _Waiting] = field(default_factory=dict)
    has_barrier: bool = False
    is_stepping: bool = False
    num_running: int = 0
    gap_since_s: float | None = None

    def admit_parked(self) -> bool:
        """Let in what has its turn now; True if anything was."""
        first_seq = self.next_seq
        while (waiting := self.parked.pop(self.next_seq, None)) is not None:
            self.behind.append(waiting)
            self.next_seq += 1
        return self.next_seq > first_seq

    def head(self) -> Part | None:
        """What may start now, if a pass has room for it."""
        if not self.released:
            return None
        part = self.released[0].parts[0]
        if isinstance(part.work, OptimStep):  # one at a time, or a lane of nothing else would fill the engine's mailbox
            return None if self.is_stepping else part
        return part if isinstance(part.work, RunLoss) or not self.num_running else None

    def start(self) -> None:
        """The head has been taken."""
        waiting = self.released[0]
        part = waiting.parts.popleft()
        if not waiting.parts:
            self.released.popleft()
        self.num_running += 1
        self.is_stepping = self.is_stepping or isinstance(part.work, OptimStep)


class OperationQueue:
    """Lanes of all runs. ``pass_tokens`` bounds the rows of a pass; it must be set before anything is queued."""

    def __init__(self, pass_tokens: int = 0) -> None:
        self.pass_tokens = pass_tokens
        self._lanes: dict[str, _Lane] = {}
        self._arrivals = count()
        self._virtual_time = 0.0
        self._last_finish: dict[str, float] = {}  # of the tenants who are owed rows

    def open(self, run_id: str, tenant_id: str, first_seq: int) -> None:
        """A lane that waits for ``first_seq``."""
        self._lanes[run_id] = _Lane(tenant_id, first_seq)

    def has(self, run_id: str) -> bool:
        return run_id in self._lanes

    def close(self, run_id: str) -> list[Operation]:
        """Forget the lane; returns what has not started, or not with all its parts."""
        lane = self._lanes.pop(run_id, None)
        if lane is None:
            return []
        if lane.tenant_id in self._last_finish:
            self._last_finish[lane.tenant_id] -= sum(waiting.num_rows for waiting in lane.released)
        return [waiting.operation for waiting in (*lane.released, *lane.behind, *lane.parked.values())]

    def accepts(self, run_id: str, seq: int) -> bool:
        """False if that seq had its turn already."""
        return seq >= self._lanes[run_id].next_seq

    def put(self, operation: Operation, now_s: float) -> None:
        """Queue it; early seqs are parked."""
        lane = self._lanes[operation.run_id]
        lane.parked[operation.seq] = _Waiting(operation, deque(_parts(operation, self.pass_tokens)))
        progressed = lane.admit_parked()
        self._release(lane)
        if not lane.parked:
            lane.gap_since_s = None
        elif progressed or lane.gap_since_s is None:
            lane.gap_since_s = now_s

    def take(self, free_rows: int) -> list[Part]:
        """What starts now: all that is no loss and may start, and losses of any lanes in the fair order, until one does
        not fit into ``free_rows`` rows of a pass. Into an empty pass (``pass_tokens`` rows) the first goes however
        large. A smaller one behind may not fill the gap: with enough of those, the order would be theirs."""
        taken: list[Part] = []
        heads = [entry for lane in self._lanes.values() if (entry := _entry(lane)) is not None]
        heapq.heapify(heads)
        while heads:
            _, _, part, lane = heapq.heappop(heads)
            if part.num_rows > free_rows and free_rows != self.pass_tokens:
                break
            free_rows -= part.num_rows
            lane.start()
            taken.append(part)
            if (entry := _entry(lane)) is not None:
                heapq.heappush(heads, entry)
        self._advance(sum(part.num_rows for part in taken))
        return taken

    def finished(self, part: Part) -> None:
        """A part that ``take`` gave has ended, well or not."""
        lane = self._lanes.get(part.operation.run_id)
        if lane is None:
            return
        lane.num_running -= 1
        if isinstance(part.work, OptimStep):
            lane.is_stepping = False
        elif not isinstance(part.work, RunLoss):
            lane.has_barrier = False
            self._release(lane)

    def give_up_gaps(self, now_s: float, timeout_s: float) -> list[Operation]:
        """Take out what waited ``timeout_s`` for a seq that never came; the lanes go on behind it."""
        given_up: list[Operation] = []
        for lane in self._lanes.values():
            if lane.gap_since_s is not None and now_s - lane.gap_since_s >= timeout_s:
                given_up.extend(waiting.operation for waiting in lane.parked.values())
                lane.next_seq = max(lane.parked) + 1
                lane.parked.clear()
                lane.gap_since_s = None
        return given_up

    @property
    def num_ready(self) -> int:
        """Operations that wait for nothing but their turn."""
        return sum(len(lane.released) + len(lane.behind) for lane in self._lanes.values())

    def _release(self, lane: _Lane) -> None:
        """Give their places in the fair order to all up to the next barrier. What waits for its own lane's barrier gets
        none before, as if it had not come yet: such a wait earns no credit."""
        while lane.behind and not lane.has_barrier:
            waiting = lane.behind.popleft()
            waiting.arrival = next(self._arrivals)
            lane.has_barrier = not isinstance(waiting.operation.work, RunLoss | OptimStep)
            if isinstance(waiting.operation.work, RunLoss):
                start = max(self._virtual_time, self._last_finish.get(lane.tenant_id, 0.0))
                waiting.finish = self._last_finish[lane.tenant_id] = start + waiting.num_rows
            lane.released.append(waiting)

    def _advance(self, num_rows: float) -> None:
        """Virtual time after ``num_rows`` more rows, shared out evenly among the tenants, as far as each is owed."""
        finishes = sorted(finish for finish in self._last_finish.values() if finish > self._virtual_time)
        for index, finish in enumerate(finishes):
            num_tenants = len(finishes) - index
            step = min(finish - self._virtual_time, num_rows / num_tenants)
            self._virtual_time += step
            num_rows -= step * num_tenants
        self._last_finish = {
            tenant_id: finish for tenant_id, finish in self._last_finish.items() if finish > self._virtual_time
        }


def _entry(lane: _Lane) -> tuple[float, int, Part, _Lane] | None:
    """The lane's head in the order of ``take``. Arrivals are distinct, so parts are never compared."""
    part = lane.head()
    return None if part is None else (lane.released[0].finish, lane.released[0].arrival, part, lane)


def _parts(operation: Operation, pass_tokens: int) -> list[Part]:
    loss = operation.work
    if not isinstance(loss, RunLoss):
        return [Part(operation, loss)]
    cuts = cut([datum.tokens_T for datum in loss.data], pass_tokens)
    return [
        Part(
            operation,
            replace(
                loss,
                data=tuple(loss.data[number] for number in piece.numbers),
                operation_id=operation.future_id,
                first_datum=piece.first,
                datum_numbers=piece.numbers,
                is_last=piece is cuts[-1],
            ),
            piece.num_rows,
        )
        for piece in cuts
    ]
