"""Which passes are with the engine, under a virtual clock: a row takes it a millisecond."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuft.engine.base import RunLoss
from tuft.fairness import VirtualCounters, jain_index
from tuft.service.passes import EnginePasses, Pass
from tuft.service.queue import Operation, OperationQueue, Part
from tuft.types import Datum

PASS = 100


@dataclass
class Rig:
    """Queue, passes, and an engine that computes what waits as the executor does: what goes ahead first, then in order,
    whatever fits a pass."""

    weights: dict[str, float] = field(default_factory=dict)
    now: float = 0.0
    mailbox: list[tuple[Part, Pass | None]] = field(default_factory=list)
    computing: list[tuple[Part, Pass | None]] = field(default_factory=list)
    ends: float = 0.0
    rows: Counter[str] = field(default_factory=Counter)
    done: dict[str, float] = field(default_factory=dict)
    seqs: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.queue = OperationQueue(PASS, VirtualCounters(self.weights, credit=PASS + 1))
        self.passes = EnginePasses(self.queue)

    def send(self, tenant_id: str, *lengths: int) -> str:
        if not self.queue.has(tenant_id):
            self.queue.open(tenant_id, tenant_id, 1)
        self.seqs[tenant_id] += 1
        seq = self.seqs[tenant_id]
        data = tuple(Datum(np.full(length, index), {}) for index, length in enumerate(lengths))
        operation = Operation(tenant_id, tenant_id, seq, f"{tenant_id}/{seq}", RunLoss(tenant_id, data, "x"))
        self.queue.put(operation, self.now)
        self.dispatch()
        return operation.future_id

    def dispatch(self) -> None:
        while True:
            parts, in_pass = self.passes.next(lambda _: True, self.now)
            if not parts:
                break
            self.mailbox += [(part, in_pass) for part in parts]
        if not self.computing:
            self._begin()

    def _begin(self) -> None:
        self.mailbox.sort(key=lambda item: not (isinstance(item[0].work, RunLoss) and item[0].work.ahead))
        rows = 0
        while self.mailbox and (not rows or rows + self.mailbox[0][0].num_rows <= PASS):
            item = self.mailbox.pop(0)
            rows += item[0].num_rows
            self.computing.append(item)
        self.ends = self.now + rows

    def run_until(self, moment: float) -> None:
        while self.computing and self.ends <= moment:
            self.now = self.ends
            ended, self.computing = self.computing, []
            for part, in_pass in ended:
                self.rows[part.operation.tenant_id] += part.num_rows
                self.queue.finished(part)
                if part.is_last:
                    self.done[part.operation.future_id] = self.now
                if in_pass is not None:
                    self.passes.answered(in_pass, self.now)
            self._begin()
            self.dispatch()
        self.now = max(self.now, moment)


def test_two_passes_are_with_the_engine_and_the_second_is_topped_up() -> None:
    rig = Rig()
    rig.send("a", 60, 60, 60)
    assert rig.passes.num_with_engine == 2
    rig.send("b", 30)
    assert rig.passes.num_with_engine == 2 + 1  # b has had nothing yet: before the pass that waits
    rig.send("a", 40)
    assert [part.num_rows for part, _ in rig.mailbox] == [60, 30]


def test_the_waiting_pass_is_topped_up_by_those_who_are_not_behind() -> None:
    rig = Rig()
    for name, size in (("a", 60), ("b", 60), ("a", 20), ("b", 40)):
        rig.send(name, size)
    assert rig.passes.num_with_engine == 2
    assert [(part.operation.tenant_id, part.num_rows) for part, _ in rig.mailbox] == [("b", 60), ("a", 20)]


def test_a_small_operation_waits_for_the_rest_of_one_pass_beside_ten_thousand_of_another_tenant() -> None:
    """The other's are of one whole pass each. Solo, 10 rows take 10 ms; a micro-batch takes 100."""
    rig = Rig()
    for _ in range(10_000):
        rig.send("many", 100)
    latencies = []
    for second in range(300):
        sent = second * 1000.0 + second % 97
        rig.run_until(sent)
        future = rig.send("few", 10)
        rig.run_until(sent + 500)
        latencies.append(rig.done[future] - sent)
    assert max(latencies) <= 10 + 100
    assert rig.rows.total() >= rig.now - 100  # and nothing is lost by it


def test_a_large_operation_of_the_other_tenant_is_no_better_than_many() -> None:
    rig = Rig()
    rig.send("huge", *[100] * 5000)
    for second in range(50):
        sent = second * 1000.0 + second * 7 % 100
        rig.run_until(sent)
        future = rig.send("few", 10)
        rig.run_until(sent + 500)
        assert rig.done[future] - sent <= 10 + 100


def test_nobody_who_always_wants_something_goes_ahead_of_the_others() -> None:
    rig = Rig()
    for _ in range(100):
        for name in "abcde":
            rig.send(name, 100)
    ahead = 0
    for moment in range(0, 40_000, 50):
        rig.run_until(float(moment))
        ahead += sum(isinstance(part.work, RunLoss) and part.work.ahead for part, _ in rig.mailbox)
    assert ahead <= 2 * 5  # when they came
    assert jain_index(rig.rows[name] for name in "abcde") > 0.999


def test_weights_one_to_three_and_equal_ones_through_the_whole_path() -> None:
    rig = Rig({"b": 3.0})
    for _ in range(400):
        for name, size in (("a", 20), ("b", 70), ("c", 45)):
            rig.send(name, size)
    rig.run_until(20_000)
    assert 0.97 * 3 <= rig.rows["b"] / rig.rows["a"] <= 1.03 * 3
    assert jain_index([rig.rows["a"], rig.rows["b"] / 3, rig.rows["c"]]) > 0.999


_sends = st.lists(
    st.tuples(st.integers(0, 3000), st.sampled_from("abcd"), st.lists(st.integers(1, 100), min_size=1, max_size=8)),
    max_size=40,
)


@given(_sends)
def test_everything_is_computed_and_the_engine_never_waits_for_us(sends: list[tuple[int, str, list[int]]]) -> None:
    rig = Rig()
    waiting = deque(sorted(sends, key=lambda item: item[0]))
    busy_until = 0.0
    for moment, tenant_id, lengths in waiting:
        rig.run_until(float(moment))
        rig.send(tenant_id, *lengths)
        busy_until = max(busy_until, float(moment)) + sum(lengths)
    rig.run_until(1e9)
    assert len(rig.done) == len(sends)
    assert max(rig.done.values(), default=0.0) == (busy_until if sends else 0.0)


@given(_sends, st.integers(0, 3000), st.integers(1, 100))
def test_who_has_sent_nothing_for_a_while_waits_for_one_pass_and_those_who_came_like_this(
    sends: list[tuple[int, str, list[int]]], moment: int, size: int
) -> None:
    """Each of the four others may be ahead by the credit and a part, at any load."""
    rig = Rig()
    for sent, tenant_id, lengths in sorted(sends, key=lambda item: item[0]):
        if sent <= moment:
            rig.run_until(float(sent))
            rig.send(tenant_id, *lengths)
    rig.run_until(float(moment))
    future = rig.send("e", size)
    rig.run_until(1e9)
    assert rig.done[future] - moment <= PASS + size + 4 * (PASS + 1 + PASS)
