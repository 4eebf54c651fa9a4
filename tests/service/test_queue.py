from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuft.engine.base import OptimStep, RunLoss
from tuft.fairness import Costs, VirtualCounters
from tuft.service.queue import Operation, OperationQueue, Part
from tuft.types import AdamParams, Datum, OptimStepResult

PASS = 100


async def barrier() -> OptimStepResult:
    return OptimStepResult({})


def loss(run_id: str, seq: int, *lengths: int, tenant_id: str | None = None) -> Operation:
    """Data of ``lengths`` tokens (one of 10 without any), which share no beginning."""
    data = tuple(Datum(np.full(length, index), {}) for index, length in enumerate(lengths or (10,)))
    return Operation(run_id, tenant_id or run_id, seq, f"{run_id}/{seq}", RunLoss(run_id, data, "cross_entropy"))


def step(run_id: str, seq: int) -> Operation:
    return Operation(run_id, run_id, seq, f"{run_id}/{seq}", OptimStep(run_id, AdamParams()))


def save(run_id: str, seq: int) -> Operation:
    return Operation(run_id, run_id, seq, f"{run_id}/{seq}", barrier)


def put(queue: OperationQueue, *operations: Operation) -> None:
    for operation in operations:
        if not queue.has(operation.run_id):
            queue.open(operation.run_id, operation.tenant_id, 1)
        queue.put(operation, now_s=0.0)


def filled(*operations: Operation) -> OperationQueue:
    queue = OperationQueue(PASS)
    put(queue, *operations)
    return queue


def names(parts: list[Part]) -> list[str]:
    return [part.operation.future_id for part in parts]


def taken(queue: OperationQueue, free_rows: int = PASS) -> list[str]:
    return names(queue.take(free_rows))


def passes(queue: OperationQueue) -> Iterator[list[Part]]:
    """Pass after pass, each ended before the next."""
    while parts := queue.take(PASS):
        yield parts
        for part in parts:
            queue.finished(part)


def served(queue: OperationQueue, num_passes: int) -> Counter[str]:
    """How many parts each tenant has in the next passes."""
    return Counter(part.operation.tenant_id for parts in islice(passes(queue), num_passes) for part in parts)


# --- lanes ------------------------------------------------------------------------------------------------------------


def test_an_early_seq_waits_for_the_ones_before_it() -> None:
    queue = filled(loss("a", 2), loss("a", 3))
    assert taken(queue) == []
    put(queue, loss("a", 1))
    assert taken(queue) == ["a/1", "a/2", "a/3"]


def test_a_barrier_starts_when_all_before_it_ended_and_nothing_passes_it() -> None:
    queue = filled(loss("a", 1), save("a", 2), loss("a", 3))
    (first,) = queue.take(PASS)
    assert taken(queue) == []
    queue.finished(first)
    (saving,) = queue.take(PASS)
    assert saving.work is barrier
    assert taken(queue) == []
    queue.finished(saving)
    assert taken(queue) == ["a/3"]


def test_a_barrier_of_one_run_does_not_hold_up_another_run() -> None:
    assert sorted(taken(filled(save("a", 1), loss("b", 1)))) == ["a/1", "b/1"]


def test_a_step_is_taken_behind_its_losses_and_the_next_losses_behind_it() -> None:
    assert taken(filled(loss("a", 1), step("a", 2), loss("a", 3))) == ["a/1", "a/2", "a/3"]


def test_a_step_waits_for_the_last_part_of_its_losses() -> None:
    queue = filled(loss("a", 1, 60, 60), step("a", 2))
    assert taken(queue) == ["a/1"]
    assert taken(queue) == ["a/1", "a/2"]


def test_a_lane_has_one_step_under_way_at_most() -> None:
    queue = filled(step("a", 1), step("a", 2))
    (first,) = queue.take(PASS)
    assert taken(queue) == []
    queue.finished(first)
    assert taken(queue) == ["a/2"]


def test_without_room_in_a_pass_only_what_is_no_loss_starts() -> None:
    assert taken(filled(loss("a", 1), step("b", 1), save("c", 1)), free_rows=0) == ["b/1", "c/1"]


def test_a_gap_that_lasts_too_long_is_given_up_and_the_lane_goes_on() -> None:
    queue = filled(loss("a", 3), loss("a", 4))
    assert queue.give_up_gaps(now_s=9.0, timeout_s=10.0) == []
    assert [operation.seq for operation in queue.give_up_gaps(now_s=10.0, timeout_s=10.0)] == [3, 4]
    assert not queue.accepts("a", 4)
    put(queue, loss("a", 5))
    assert taken(queue) == ["a/5"]


def test_closing_a_lane_returns_what_it_still_held() -> None:
    queue = filled(loss("a", 1), loss("a", 2, 80, 80), save("a", 3), loss("a", 4), loss("a", 6))
    assert taken(queue) == ["a/1", "a/2"]
    assert [operation.seq for operation in queue.close("a")] == [2, 3, 4, 6]
    assert not queue.has("a")
    assert queue.take(PASS) == []


# --- passes -----------------------------------------------------------------------------------------------------------


def test_small_losses_of_many_runs_share_a_pass() -> None:
    queue = filled(loss("a", 1, 40), loss("b", 1, 40), loss("c", 1, 40))
    assert taken(queue) == ["a/1", "b/1"]


def test_a_large_loss_is_cut_into_parts_that_tell_where_they_belong() -> None:
    queue = filled(loss("a", 1, 40, 40, 40, 250, 30))
    works = [part.work for parts in passes(queue) for part in parts]
    assert all(isinstance(work, RunLoss) for work in works)
    assert [(work.first_datum, len(work.data), work.is_last) for work in works if isinstance(work, RunLoss)] == [
        (0, 2, False),
        (2, 1, False),
        (3, 1, False),
        (4, 1, True),
    ]
    assert {work.operation_id for work in works if isinstance(work, RunLoss)} == {"a/1"}


def test_a_common_beginning_counts_once() -> None:
    prompt = np.arange(70)
    data = tuple(Datum(np.append(prompt, 1000 + answer), {}) for answer in range(20))
    queue = filled(Operation("a", "a", 1, "a/1", RunLoss("a", data, "cross_entropy")))
    (part,) = queue.take(PASS)
    assert (part.num_rows, part.is_last) == (90, True)


def test_a_shuffled_group_is_cut_as_one_in_order() -> None:
    """Two prompts of 60 tokens, 40 answers of one token to each."""
    grouped = [np.append(np.full(60, prompt), 1000 + answer) for prompt in (1, 2) for answer in range(40)]
    places = np.random.default_rng(0).permutation(80).tolist()
    cuts = []
    for sequences in (grouped, [grouped[place] for place in places]):
        data = tuple(Datum(tokens_T, {}) for tokens_T in sequences)
        queue = filled(Operation("a", "a", 1, "a/1", RunLoss("a", data, "cross_entropy")))
        parts = [part for parts in passes(queue) for part in parts]
        works = [part.work for part in parts if isinstance(part.work, RunLoss)]
        for work in works:
            assert all(datum is data[number] for number, datum in zip(work.numbers, work.data, strict=True))
        assert sorted(number for work in works for number in work.numbers) == list(range(80))
        assert [(work.first_datum, work.is_last) for work in works] == [(0, False), (40, True)]
        cuts.append([part.num_rows for part in parts])
    assert cuts == [[100, 100]] * 2


def test_a_part_larger_than_a_pass_goes_alone() -> None:
    queue = filled(loss("a", 1, 500), loss("b", 1, 10), loss("c", 1, 495))
    assert [names(parts) for parts in passes(queue)] == [["a/1"], ["b/1"], ["c/1"]]


def test_a_pass_that_waits_is_topped_up_to_its_bound() -> None:
    queue = filled(loss("a", 1, 40))
    assert taken(queue) == ["a/1"]
    put(queue, loss("b", 1, 40), loss("c", 1, 40))
    assert taken(queue, free_rows=60) == ["b/1"]


def test_many_small_ones_do_not_fill_the_gap_before_a_larger_one() -> None:
    queue = filled(loss("a", 1, 60), loss("b", 1, 60), *(loss("c", seq, 10) for seq in range(1, 9)))
    first, second, third = (names(parts) for parts in passes(queue))
    assert first == ["a/1"]
    assert second == ["b/1", *(f"c/{seq}" for seq in range(1, 5))]
    assert third == [f"c/{seq}" for seq in range(5, 9)]


# --- the fair order ---------------------------------------------------------------------------------------------------


def test_equal_large_operations_advance_together() -> None:
    queue = filled(loss("a", 1, *[50] * 6), loss("b", 1, *[50] * 6))
    assert [names(parts) for parts in passes(queue)] == [["a/1"], ["b/1"]] * 3


def test_weights_one_to_three_have_one_to_three() -> None:
    queue = OperationQueue(PASS, VirtualCounters({"b": 3.0}))
    put(queue, *(loss(run_id, seq, 20) for run_id in "ab" for seq in range(1, 201)))
    assert served(queue, 40) == {"a": 50, "b": 150}


def test_a_forward_alone_costs_less_than_one_with_a_backward() -> None:
    queue = OperationQueue(PASS, costs=Costs(forward_backward=1.0, forward=0.5))
    for run_id in "ab":
        for seq in range(1, 101):
            operation = loss(run_id, seq, 50)
            assert isinstance(operation.work, RunLoss)
            operation.work = replace(operation.work, backward=run_id == "a")
            put(queue, operation)
    assert served(queue, 30) == {"a": 20, "b": 40}


def test_what_an_engine_lost_is_not_held_against_its_tenant() -> None:
    queue = filled(loss("a", 1, 80), *(loss("b", seq, 80) for seq in range(1, 4)), loss("a", 2, 80))
    (first,) = queue.take(PASS)
    assert (names([first]), queue.counters.level("a")) == (["a/1"], 80)
    queue.interrupted(first)
    assert queue.counters.level("a") == 0
    assert taken(queue) == ["b/1"]
    assert taken(queue) == ["a/1"]


def test_only_those_of_a_lower_level_are_taken_where_that_is_asked() -> None:
    queue = filled(loss("a", 1, 50), loss("b", 1, 10), loss("b", 2, 10))
    assert taken(queue) == ["a/1", "b/1", "b/2"]
    put(queue, loss("a", 2, 10), loss("b", 3, 10), loss("b", 4, 30), loss("b", 5, 10))
    assert names(queue.take(PASS, below=50.0)) == ["b/3", "b/4"]


def test_a_huge_operation_does_not_delay_the_small_ones_of_others() -> None:
    queue = filled(loss("huge", 1, *[100] * 50))
    steps = passes(queue)
    for _ in range(20):
        assert names(next(steps)) == ["huge/1"]
    put(queue, loss("small", 1, 20))
    assert names(next(steps)) == ["small/1"]


def test_a_small_operation_goes_before_two_huge_ones_whichever_is_under_way() -> None:
    queue = OperationQueue(PASS, VirtualCounters(credit=PASS))
    put(queue, loss("a", 1, *[100] * 10), loss("b", 1, *[100] * 10))
    steps = passes(queue)
    assert names(next(steps)) == ["a/1"]
    for number in range(19):
        assert names(next(steps)) == ["a/1" if number % 2 else "b/1"]
        put(queue, loss("small", number + 1, 1))
        assert "small" in names(next(steps))[0]


def test_many_small_operations_get_a_fair_share_and_no_more() -> None:
    many, few = [loss("many", seq, 50) for seq in range(1, 41)], [loss("few", seq, 50) for seq in range(1, 11)]
    queue = filled(*many, *few)
    assert served(queue, 10) == {"many": 10, "few": 10}


def test_many_runs_of_a_tenant_share_the_tenants_share() -> None:
    queue = filled(
        *(loss(f"a{run}", seq, 50, tenant_id="a") for run in range(4) for seq in range(1, 6)),
        *(loss("b0", seq, 50, tenant_id="b") for seq in range(1, 6)),
    )
    assert served(queue, 5) == {"a": 5, "b": 5}


def test_idling_earns_no_credit() -> None:
    queue = filled(*(loss("busy", seq, 100) for seq in range(1, 21)))
    assert served(queue, 10) == {"busy": 10}
    put(queue, *(loss("late", seq, 100) for seq in range(1, 11)))
    assert served(queue, 6) == {"busy": 3, "late": 3}


def test_waiting_for_ones_own_barrier_earns_no_credit() -> None:
    queue = filled(save("slow", 1), *(loss("slow", seq, 100) for seq in range(2, 12)))
    (saving,) = queue.take(PASS)
    put(queue, *(loss("busy", seq, 100) for seq in range(1, 21)))
    for _ in range(10):
        (part,) = queue.take(PASS)
        queue.finished(part)
    queue.finished(saving)
    assert served(queue, 6) == {"busy": 3, "slow": 3}


def test_what_a_closed_run_had_queued_is_not_held_against_its_tenant() -> None:
    queue = filled(loss("gone", 1, *[100] * 50, tenant_id="a"), *(loss("b", seq, 100) for seq in range(1, 11)))
    queue.close("gone")
    put(queue, *(loss("new", seq, 100, tenant_id="a") for seq in range(1, 11)))
    assert served(queue, 6) == {"a": 3, "b": 3}


# --- laws -------------------------------------------------------------------------------------------------------------

_kinds = st.lists(st.sampled_from([loss, step, save]), min_size=8, max_size=8)


@given(st.permutations(range(1, 9)), _kinds, st.integers(0, PASS))
def test_any_order_of_arrival_runs_every_seq_once_and_in_order(
    order: list[int], kinds: list[Callable[[str, int], Operation]], free_rows: int
) -> None:
    queue = OperationQueue(PASS)
    queue.open("a", "a", 1)
    ran: list[int] = []
    for seq in order:
        put(queue, kinds[seq - 1]("a", seq))
        while parts := [*queue.take(free_rows), *queue.take(PASS)]:
            ran += [part.operation.seq for part in parts]
            for part in parts:
                queue.finished(part)
    assert ran == list(range(1, 9))


_calls = st.lists(
    st.tuples(st.sampled_from("abcd"), st.lists(st.integers(1, 130), min_size=1, max_size=6)), max_size=25
)


def _put_all(queue: OperationQueue, calls: list[tuple[str, list[int]]]) -> None:
    seqs: Counter[str] = Counter()
    for run_id, lengths in calls:
        seqs[run_id] += 1
        put(queue, loss(run_id, seqs[run_id], *lengths))


@given(_calls)
def test_every_part_runs_once_in_order_and_a_pass_keeps_its_bound(calls: list[tuple[str, list[int]]]) -> None:
    queue = OperationQueue(PASS)
    _put_all(queue, calls)
    seen: dict[str, list[tuple[int, int]]] = {}
    for parts in passes(queue):
        assert len(parts) == 1 or sum(part.num_rows for part in parts) <= PASS
        for part in parts:
            assert isinstance(part.work, RunLoss)
            seen.setdefault(part.operation.run_id, []).extend(
                (part.operation.seq, number) for number in part.work.numbers
            )
    assert queue.num_ready == 0
    expected: dict[str, list[tuple[int, int]]] = {}
    seqs: Counter[str] = Counter()
    for run_id, lengths in calls:
        seqs[run_id] += 1
        expected.setdefault(run_id, []).extend((seqs[run_id], index) for index in range(len(lengths)))
    assert seen == expected


@given(_calls, st.integers(0, 12), st.integers(1, 300))
def test_an_operation_waits_for_no_more_than_a_fair_share_and_two_passes(
    calls: list[tuple[str, list[int]]], num_passes: int, size: int
) -> None:
    """Shared out evenly, ``size`` rows of a newcomer are done when each of the others had as many."""
    queue = OperationQueue(PASS)
    _put_all(queue, calls)
    steps = passes(queue)
    for _ in range(num_passes):
        next(steps, None)
    newcomer = loss("e", 1, *[10] * (size // 10), *([size % 10] if size % 10 else []))
    put(queue, newcomer)
    rows_of_others = 0
    for parts in steps:
        rows_of_others += sum(part.num_rows for part in parts if part.operation is not newcomer)
        if any(part.operation is newcomer and part.is_last for part in parts):
            break
    assert rows_of_others <= 4 * (size + 130) + 130


@given(_calls, _calls)
def test_tenants_with_work_left_have_had_equally_much(
    first: list[tuple[str, list[int]]], second: list[tuple[str, list[int]]]
) -> None:
    """Up to two parts, however large the operations are that they belong to."""
    queue = OperationQueue(PASS)
    _put_all(queue, [*first, *second])
    had: Counter[str] = Counter(dict.fromkeys("abcd", 0))
    left: Counter[str] = Counter()
    for run_id, lengths in [*first, *second]:
        left[run_id] += sum(lengths)
    for parts in passes(queue):
        for part in parts:
            had[part.operation.run_id] += part.num_rows
        busy = [had[run_id] for run_id in "abcd" if left[run_id] > had[run_id]]
        assert not busy or max(busy) - min(busy) <= 2 * 130
