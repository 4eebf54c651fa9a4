"""Which operations run next: a pure decision over plain objects. No clock but the one passed in, no I/O.

Each run is a *lane*: its operations go in the order of their seq. One that comes early is parked until the seqs before
it came. Losses are cut into *parts* that fit a pass; parts of any lanes share passes. An optim_step is sent behind its
lane's losses without waiting for them, since the engine computes in the order in which it is asked. Everything else
(save, load, ...) is a barrier of its own lane: it starts when all before it ended, and nothing of the lane passes it.

Between tenants the order is that of ``tuft.fairness``: the tenant who was served least for its weight goes first, part
by part, so that a huge operation holds nobody else for longer than a part (docs/adr/0015). Among a tenant's own runs
it is that of arrival. Samples charge the same counters.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf

from tuft.engine.base import OptimStep, RunLoss
from tuft.fairness import Costs, VirtualCounters
from tuft.prefixes import cut
from tuft.service.calls import Call
from tuft.service.forecast import Arrivals
from tuft.types import Failure

Work = RunLoss | OptimStep | Call
TRAINING = "training"
MAX_LOSSES = 64
"""Taken at once. Hundreds of small ones fit a pass; to take all of them would hold the event loop for 0.2 s."""


@dataclass(slots=True)
class Operation:
    """One queued call of a run. ``work`` None: a loss whose data are on the disk alone; ``num_rows``: what a loss needs
    of passes, ``num_tokens``: those of its data. ``name``: what the trace calls it; ``key_number``: the API key by
    which it was called. ``error``: what its first failed part ended with; ``num_deaths``: how many engines ended while
    they held it."""

    run_id: str
    tenant_id: str
    seq: int
    future_id: str
    work: Work | None
    num_rows: int = 0
    num_tokens: int = 0
    name: str = ""
    key_number: int = 0
    error: Failure | None = None
    num_deaths: int = 0

    @property
    def is_loss(self) -> bool:
        return self.work is None or isinstance(self.work, RunLoss)

    @property
    def is_barrier(self) -> bool:
        return not self.is_loss and not isinstance(self.work, OptimStep)


MayStart = Callable[[Operation], bool]
"""Whether what an operation needs is there: its data, and its run in the engine. If not, it is soon."""


@dataclass(frozen=True, slots=True)
class Part:
    """What starts as one: some data of a loss, needing ``num_rows`` rows of a pass, or an operation of another kind.
    ``level``: its tenant's when it was taken, before the part was charged."""

    operation: Operation
    work: Work
    num_rows: int = 0
    level: float = 0.0

    @property
    def is_last(self) -> bool:
        return not isinstance(self.work, RunLoss) or self.work.is_last


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operation stands: ``running`` with all its parts, ``in line``, ``behind`` a barrier of its run, or
    ``early``, with ``awaited_seq`` missing before it. ``cost``: of what has not started; ``arrival``: its place among
    its tenant's."""

    operation: Operation
    state: str
    cost: float
    arrival: int | None
    awaited_seq: int | None


@dataclass(slots=True)
class _Waiting:
    """An operation with parts that have not started (None: not cut yet). ``charged``: what those cost that have."""

    operation: Operation
    parts: deque[Part] | None = None
    arrival: int = 0
    charged: float = 0.0

    def cut(self, pass_tokens: int) -> deque[Part]:
        if self.parts is None:
            self.parts = deque(_parts(self.operation, pass_tokens))
        return self.parts

    @property
    def num_rows(self) -> int:
        """Of what has not started."""
        return self.operation.num_rows if self.parts is None else sum(part.num_rows for part in self.parts)


@dataclass(slots=True)
class _Lane:
    """``released`` ends with the first barrier that has not ended; ``behind`` is what waits for that. ``started`` are
    those of which a part runs or has run, by their seq."""

    tenant_id: str
    next_seq: int
    released: deque[_Waiting] = field(default_factory=deque)
    behind: deque[_Waiting] = field(default_factory=deque)
    parked: dict[int, _Waiting] = field(default_factory=dict)
    started: dict[int, _Waiting] = field(default_factory=dict)
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

    def head(self, may_start: MayStart, pass_tokens: int) -> Part | None:
        """What may start now, if a pass has room for it."""
        if not self.released:
            return None
        waiting = self.released[0]
        operation = waiting.operation
        if operation.is_barrier and self.num_running:
            return None
        if isinstance(operation.work, OptimStep) and self.is_stepping:
            return None  # one at a time, or a lane of nothing else would fill the engine's mailbox
        return waiting.cut(pass_tokens)[0] if may_start(operation) else None

    def start(self, cost: float = 0.0) -> None:
        """The head has been taken."""
        waiting = self.released[0]
        assert waiting.parts is not None
        part = waiting.parts.popleft()
        waiting.charged += cost
        self.started[part.operation.seq] = waiting
        if not waiting.parts:
            self.released.popleft()
        self.num_running += 1
        self.is_stepping = self.is_stepping or isinstance(part.work, OptimStep)

    def end(self, part: Part) -> None:
        """A part has ended, well or not."""
        self.num_running -= 1
        if isinstance(part.work, OptimStep):
            self.is_stepping = False
        if part.is_last:
            self.started.pop(part.operation.seq, None)

    def put_back(self, operation: Operation) -> float:
        """All of a started operation is to be done again, in its place. Returns what it was charged in vain."""
        waiting = self.started.pop(operation.seq, None)
        if waiting is None:
            return 0.0
        charged, waiting.charged, waiting.parts = waiting.charged, 0.0, None
        if waiting not in self.released:
            place = sum(other.operation.seq < operation.seq for other in self.released)
            self.released.insert(place, waiting)
        return charged


class OperationQueue:
    """Lanes of all runs. ``pass_tokens`` bounds the rows of a pass; it must be set before anything is queued."""

    def __init__(
        self, pass_tokens: int = 0, counters: VirtualCounters | None = None, costs: Costs | None = None
    ) -> None:
        self.pass_tokens = pass_tokens
        self.counters = counters or VirtualCounters()
        self.costs = costs or Costs()
        self.arrivals = Arrivals()
        self._lanes: dict[str, _Lane] = {}
        self._arrivals = count()

    def open(self, run_id: str, tenant_id: str, next_seq: int, admitted: Sequence[Operation] = ()) -> None:
        """A lane that waits for ``next_seq``; those ``admitted`` had their turn to come, and have not ended."""
        lane = self._lanes[run_id] = _Lane(tenant_id, next_seq)
        lane.behind.extend(_Waiting(operation) for operation in admitted)
        self._release(lane)

    def has(self, run_id: str) -> bool:
        return run_id in self._lanes

    def close(self, run_id: str) -> list[Operation]:
        """Forget the lane; returns what has not started, or not with all its parts."""
        lane = self._lanes.pop(run_id, None)
        if lane is None:
            return []
        return [waiting.operation for waiting in (*lane.released, *lane.behind, *lane.parked.values())]

    def is_running(self, run_id: str) -> bool:
        """True while a part of the run's has not ended."""
        return run_id in self._lanes and self._lanes[run_id].num_running > 0

    def is_idle(self, run_id: str) -> bool:
        """True if the run has nothing to do."""
        lane = self._lanes.get(run_id)
        return lane is not None and not (lane.num_running or lane.released or lane.behind or lane.parked)

    def started_seq(self, run_id: str) -> int | None:
        """The last seq up to which all have started, with all their parts; None while a barrier runs, whose effect may
        be there or not."""
        lane = self._lanes.get(run_id)
        if lane is None or any(waiting.operation.is_barrier for waiting in lane.started.values()):
            return None
        first = next(iter((*lane.released, *lane.behind)), None)
        return (lane.next_seq if first is None else first.operation.seq) - 1

    def accepts(self, run_id: str, seq: int) -> bool:
        """False if that seq had its turn already."""
        return seq >= self._lanes[run_id].next_seq

    def put(self, operation: Operation, now_s: float) -> None:
        """Queue it; early seqs are parked."""
        lane = self._lanes[operation.run_id]
        lane.parked[operation.seq] = _Waiting(operation)
        self.arrivals.note(operation.tenant_id, self._cost_of(operation, operation.num_rows), now_s)
        progressed = lane.admit_parked()
        self._release(lane)
        if not lane.parked:
            lane.gap_since_s = None
        elif progressed or lane.gap_since_s is None:
            lane.gap_since_s = now_s

    def take(self, free_rows: int, may_start: MayStart = lambda _: True, below: float = inf) -> list[Part]:
        """What starts now: all that is no loss and may start, and up to ``MAX_LOSSES`` losses of any lanes in the fair
        order, until one does not fit into ``free_rows`` rows of a pass. Into an empty pass (``pass_tokens`` rows) the
        first goes however large. A smaller one behind may not fill the gap: with enough of those, the order would be
        theirs. ``below``: losses of tenants whose level is lower, and no others."""
        taken: list[Part] = []
        heads: dict[str, list[tuple[int, Part, _Lane]]] = {}
        for lane in self._lanes.values():
            self._advance(lane, may_start, taken, heads)
        self.counters.now_want(TRAINING, heads)
        num_left = MAX_LOSSES
        while heads and num_left:
            num_left -= 1
            tenant_id = min(heads, key=self.counters.order)
            level = self.counters.level(tenant_id)
            _, part, lane = heads[tenant_id][0]
            if level >= below or (part.num_rows > free_rows and free_rows != self.pass_tokens):
                break
            heapq.heappop(heads[tenant_id])
            if not heads[tenant_id]:
                del heads[tenant_id]
            free_rows -= part.num_rows
            cost = self.cost(part)
            self.counters.charge(tenant_id, cost)
            lane.start(cost)
            taken.append(replace(part, level=level))
            self._advance(lane, may_start, taken, heads)
        return taken

    def finished(self, part: Part) -> None:
        """A part that ``take`` gave has ended, well or not."""
        lane = self._lanes.get(part.operation.run_id)
        if lane is None:
            return
        lane.end(part)
        if part.operation.is_barrier:
            lane.has_barrier = False
            self._release(lane)

    def interrupted(self, part: Part) -> None:
        """A part that ``take`` gave has ended with its engine: its operation starts again with all its parts."""
        lane = self._lanes.get(part.operation.run_id)
        if lane is None:
            return
        self.counters.charge(part.operation.tenant_id, -lane.put_back(part.operation))
        lane.end(part)

    def waits_for(self, run_id: str, seq: int) -> bool:
        """True if that seq has not come, and later ones have."""
        lane = self._lanes.get(run_id)
        return lane is not None and bool(lane.parked) and lane.next_seq == seq

    def renew_gap(self, run_id: str, now_s: float) -> None:
        """What the lane waits for was seen: its client is there."""
        lane = self._lanes.get(run_id)
        if lane is not None and lane.gap_since_s is not None:
            lane.gap_since_s = now_s

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

    def _advance(
        self,
        lane: _Lane,
        may_start: MayStart,
        taken: list[Part],
        heads: dict[str, list[tuple[int, Part, _Lane]]],
    ) -> None:
        """Take from the lane what is no loss; its next loss joins the ``heads`` of its tenant. Arrivals are distinct,
        so parts are never compared."""
        while (part := lane.head(may_start, self.pass_tokens)) is not None:
            if isinstance(part.work, RunLoss):
                heapq.heappush(heads.setdefault(lane.tenant_id, []), (lane.released[0].arrival, part, lane))
                return
            lane.start()
            taken.append(part)

    def cost(self, part: Part) -> float:
        """What a part of a loss is charged."""
        return self._cost_of(part.operation, part.num_rows)

    def _cost_of(self, operation: Operation, num_rows: int) -> float:
        is_forward = isinstance(operation.work, RunLoss) and not operation.work.backward
        return num_rows * (self.costs.forward if is_forward else self.costs.forward_backward)

    def places(self) -> Iterator[Place]:
        """All operations that have not ended, the runs' one after the other, each run's in order. The queue may change
        meanwhile: a run's are told as they were when its first was."""
        for lane in tuple(self._lanes.values()):
            released = set(map(id, lane.released))
            with_engine = [one for one in lane.started.values() if id(one) not in released]
            gap = None if not lane.parked else lane.next_seq
            for state, some, awaited in (
                ("running", with_engine, None),
                ("in line", tuple(lane.released), None),
                ("behind", tuple(lane.behind), None),
                ("early", tuple(lane.parked.values()), gap),
            ):
                for one in some:
                    arrival = None if state in ("behind", "early") else one.arrival
                    yield Place(one.operation, state, self._cost_of(one.operation, one.num_rows), arrival, awaited)

    def _release(self, lane: _Lane) -> None:
        """Let all up to the next barrier have their turn. What waits for its own lane's barrier is as if it had not
        come yet: such a wait is idling."""
        while lane.behind and not lane.has_barrier:
            waiting = lane.behind.popleft()
            waiting.arrival = next(self._arrivals)
            lane.has_barrier = waiting.operation.is_barrier
            lane.released.append(waiting)


def _parts(operation: Operation, pass_tokens: int) -> list[Part]:
    work = operation.work
    assert work is not None
    if not isinstance(work, RunLoss):
        return [Part(operation, work)]
    return [Part(operation, loss, num_rows) for loss, num_rows in cut_loss(work, operation.future_id, pass_tokens)]


def cut_loss(loss: RunLoss, operation_id: str, pass_tokens: int) -> list[tuple[RunLoss, int]]:
    """The parts of ``loss`` that fit a pass, each with the rows it needs."""
    cuts = cut([datum.tokens_T for datum in loss.data], pass_tokens)
    return [
        (
            replace(
                loss,
                data=tuple(loss.data[number] for number in piece.numbers),
                operation_id=operation_id,
                first_datum=piece.first,
                datum_numbers=piece.numbers,
                is_last=piece is cuts[-1],
            ),
            piece.num_rows,
        )
        for piece in cuts
    ]


def rows_of(loss: RunLoss, pass_tokens: int) -> int:
    """What it needs of passes of that size."""
    return sum(piece.num_rows for piece in cut([datum.tokens_T for datum in loss.data], pass_tokens))
