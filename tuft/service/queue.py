"""Which operations run next: a pure decision over plain objects. No clock but the one passed in, no I/O.

Each run is a *lane*: its operations go in the order of their seq, one after the other. An operation that comes early
is parked until the seqs before it came. Between lanes, the tenant who was served least goes first, and losses of many
runs are fused into one pass up to a token budget. Everything that is not a loss (optim_step, save, load, ...) is a
barrier of its own lane: it starts when all before it ended, and nothing of the lane passes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tuft.engine.base import RunLoss
from tuft.types import FutureResult

Barrier = Callable[[], Awaitable[FutureResult]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One queued call of a run."""

    run_id: str
    tenant_id: str
    seq: int
    future_id: str
    work: RunLoss | Barrier

    @property
    def num_tokens(self) -> int:
        return self.work.num_tokens if isinstance(self.work, RunLoss) else 0


@dataclass(slots=True)
class _Lane:
    tenant_id: str
    next_seq: int
    ready: deque[Operation] = field(default_factory=deque)
    parked: dict[int, Operation] = field(default_factory=dict)
    num_running: int = 0
    gap_since_s: float | None = None

    def admit_parked(self) -> bool:
        """Make ready what has its turn now; True if anything was."""
        first_seq = self.next_seq
        while (operation := self.parked.pop(self.next_seq, None)) is not None:
            self.ready.append(operation)
            self.next_seq += 1
        return self.next_seq > first_seq

    def head(self, losses_only: bool) -> Operation | None:
        """The operation that may start now. ``losses_only``: the lane has losses in the pass that is being filled."""
        if not self.ready or (self.num_running and not losses_only):
            return None
        operation = self.ready[0]
        return None if losses_only and not isinstance(operation.work, RunLoss) else operation


class OperationQueue:
    """Lanes of all runs."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._served_tokens: dict[str, float] = {}

    def open(self, run_id: str, tenant_id: str, first_seq: int) -> None:
        """A lane that waits for ``first_seq``."""
        self._lanes[run_id] = _Lane(tenant_id, first_seq)

    def has(self, run_id: str) -> bool:
        return run_id in self._lanes

    def close(self, run_id: str) -> list[Operation]:
        """Forget the lane; returns what it still held, ready and parked."""
        lane = self._lanes.pop(run_id, None)
        return [] if lane is None else [*lane.ready, *lane.parked.values()]

    def accepts(self, run_id: str, seq: int) -> bool:
        """False if that seq had its turn already."""
        return seq >= self._lanes[run_id].next_seq

    def put(self, operation: Operation, now_s: float) -> None:
        """Queue it; early seqs are parked."""
        lane = self._lanes[operation.run_id]
        if not lane.ready and not lane.num_running:
            self._join(lane.tenant_id)
        lane.parked[operation.seq] = operation
        progressed = lane.admit_parked()
        if not lane.parked:
            lane.gap_since_s = None
        elif progressed or lane.gap_since_s is None:
            lane.gap_since_s = now_s

    def take(self, token_budget: int) -> list[Operation]:
        """What starts now, in order: barriers at the head of idle lanes, and losses of any lanes up to ``token_budget``
        tokens (0: no loss; the first loss is taken however large)."""
        taken: list[Operation] = []
        in_pass: set[str] = set()
        tokens = 0
        while True:
            heads = [
                (run_id, lane, head)
                for run_id, lane in self._lanes.items()
                if (head := lane.head(run_id in in_pass)) is not None
                and (
                    not isinstance(head.work, RunLoss)
                    or (token_budget and (not in_pass or tokens + head.num_tokens <= token_budget))
                )
            ]
            if not heads:
                return taken
            run_id, lane, head = min(heads, key=lambda item: self._served_tokens.get(item[1].tenant_id, 0.0))
            lane.ready.popleft()
            lane.num_running += 1
            taken.append(head)
            if isinstance(head.work, RunLoss):
                in_pass.add(run_id)
                tokens += head.num_tokens
                self._served_tokens[lane.tenant_id] = self._served_tokens.get(lane.tenant_id, 0.0) + head.num_tokens

    def finished(self, operation: Operation) -> None:
        """An operation that ``take`` gave has ended, well or not."""
        lane = self._lanes.get(operation.run_id)
        if lane is not None:
            lane.num_running -= 1

    def give_up_gaps(self, now_s: float, timeout_s: float) -> list[Operation]:
        """Take out what waited ``timeout_s`` for a seq that never came; the lanes go on behind it."""
        given_up: list[Operation] = []
        for lane in self._lanes.values():
            if lane.gap_since_s is not None and now_s - lane.gap_since_s >= timeout_s:
                given_up.extend(lane.parked.values())
                lane.next_seq = max(lane.parked) + 1
                lane.parked.clear()
                lane.gap_since_s = None
        return given_up

    @property
    def num_ready(self) -> int:
        """Operations that wait for nothing but their turn."""
        return sum(len(lane.ready) for lane in self._lanes.values())

    def _join(self, tenant_id: str) -> None:
        """A tenant who comes back from idling starts level with the others: past idleness earns no credit."""
        busy = [
            self._served_tokens.get(lane.tenant_id, 0.0)
            for lane in self._lanes.values()
            if (lane.ready or lane.num_running) and lane.tenant_id != tenant_id
        ]
        if busy:
            self._served_tokens[tenant_id] = max(self._served_tokens.get(tenant_id, 0.0), min(busy))
