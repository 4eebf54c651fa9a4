from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuft.engine.base import RunLoss
from tuft.service.queue import Operation, OperationQueue
from tuft.types import Datum, OptimStepResult


async def barrier() -> OptimStepResult:
    return OptimStepResult({})


def loss(run_id: str, seq: int, num_tokens: int = 10, tenant_id: str | None = None) -> Operation:
    datum = Datum(np.zeros(num_tokens, dtype=np.int64), {})
    return Operation(run_id, tenant_id or run_id, seq, f"{run_id}/{seq}", RunLoss(run_id, (datum,), "cross_entropy"))


def step(run_id: str, seq: int) -> Operation:
    return Operation(run_id, run_id, seq, f"{run_id}/{seq}", barrier)


def filled(*operations: Operation) -> OperationQueue:
    queue = OperationQueue()
    for operation in operations:
        if not queue.has(operation.run_id):
            queue.open(operation.run_id, operation.tenant_id, 1)
        queue.put(operation, now_s=0.0)
    return queue


def taken(queue: OperationQueue, budget: int = 100) -> list[str]:
    return [operation.future_id for operation in queue.take(budget)]


def test_an_early_seq_waits_for_the_ones_before_it() -> None:
    queue = filled(loss("a", 2), loss("a", 3))
    assert taken(queue) == []
    queue.put(loss("a", 1), now_s=1.0)
    assert taken(queue) == ["a/1", "a/2", "a/3"]


def test_losses_of_many_runs_are_fused_up_to_the_token_budget() -> None:
    queue = filled(loss("a", 1, 40), loss("b", 1, 40), loss("c", 1, 40))
    assert taken(queue, budget=100) == ["a/1", "b/1"]


def test_a_loss_larger_than_the_budget_goes_alone() -> None:
    queue = filled(loss("a", 1, 500), loss("b", 1, 10))
    assert taken(queue, budget=100) == ["a/1"]


def test_a_barrier_starts_when_all_before_it_ended_and_nothing_passes_it() -> None:
    first, update, second = loss("a", 1), step("a", 2), loss("a", 3)
    queue = filled(first, update, second)
    assert taken(queue) == ["a/1"]
    assert taken(queue) == []
    queue.finished(first)
    assert taken(queue) == ["a/2"]
    assert taken(queue) == []
    queue.finished(update)
    assert taken(queue) == ["a/3"]


def test_a_barrier_of_one_run_does_not_hold_up_another_run() -> None:
    queue = filled(step("a", 1), loss("b", 1))
    assert sorted(taken(queue)) == ["a/1", "b/1"]


def test_without_a_token_budget_only_barriers_start() -> None:
    queue = filled(loss("a", 1), step("b", 1))
    assert taken(queue, budget=0) == ["b/1"]


def test_the_tenant_served_least_goes_first() -> None:
    queue = filled(loss("busy", 1, 90), loss("busy", 2, 90), loss("busy", 3, 90))
    assert taken(queue) == ["busy/1"]
    queue.open("late", "late", 1)
    queue.put(loss("late", 1, 90), now_s=0.0)
    queue.finished(loss("busy", 1, 90))
    first, second = taken(queue), None
    queue.finished(loss(first[0].split("/")[0], 1))
    second = taken(queue)
    assert {first[0], second[0]} == {"busy/2", "late/1"}


def test_idling_earns_no_credit() -> None:
    queue = filled(*(loss("busy", seq, 100) for seq in range(1, 21)))
    for seq in range(1, 11):
        assert taken(queue) == [f"busy/{seq}"]
        queue.finished(loss("busy", seq))
    queue.open("late", "late", 1)
    for seq in range(1, 11):
        queue.put(loss("late", seq, 100), now_s=0.0)
    order = []
    for _ in range(6):
        (future_id,) = taken(queue)
        order.append(future_id.split("/")[0])
        queue.finished(loss(order[-1], 0))
    assert order.count("busy") == order.count("late") == 3


def test_a_gap_that_lasts_too_long_is_given_up_and_the_lane_goes_on() -> None:
    queue = filled(loss("a", 3), loss("a", 4))
    assert queue.give_up_gaps(now_s=9.0, timeout_s=10.0) == []
    assert [operation.seq for operation in queue.give_up_gaps(now_s=10.0, timeout_s=10.0)] == [3, 4]
    assert not queue.accepts("a", 4)
    queue.put(loss("a", 5), now_s=11.0)
    assert taken(queue) == ["a/5"]


def test_closing_a_lane_returns_what_it_still_held() -> None:
    queue = filled(loss("a", 1), loss("a", 3))
    assert sorted(operation.seq for operation in queue.close("a")) == [1, 3]
    assert not queue.has("a")


@given(st.permutations(range(1, 9)), st.lists(st.booleans(), min_size=8, max_size=8), st.integers(1, 60))
def test_any_order_of_arrival_runs_every_seq_once_and_in_order(
    order: list[int], is_barrier: list[bool], budget: int
) -> None:
    queue = OperationQueue()
    queue.open("a", "a", 1)
    ran: list[int] = []
    for seq in order:
        queue.put(step("a", seq) if is_barrier[seq - 1] else loss("a", seq), now_s=0.0)
        while batch := queue.take(budget):
            ran += [operation.seq for operation in batch]
            for operation in batch:
                queue.finished(operation)
    assert ran == list(range(1, 9))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 80)), min_size=1, max_size=30), st.integers(1, 100))
def test_a_pass_never_exceeds_its_budget_unless_it_is_one_loss(calls: list[tuple[str, int]], budget: int) -> None:
    queue = OperationQueue()
    for run_id in "abcd":
        queue.open(run_id, run_id, 1)
    counts = dict.fromkeys("abcd", 0)
    for run_id, num_tokens in calls:
        counts[run_id] += 1
        queue.put(loss(run_id, counts[run_id], num_tokens), now_s=0.0)
    seen = 0
    while batch := queue.take(budget):
        assert len(batch) == 1 or sum(operation.num_tokens for operation in batch) <= budget
        seen += len(batch)
        for operation in batch:
            queue.finished(operation)
    assert seen == len(calls)
