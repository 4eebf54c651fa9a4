"""Rates and the fair order: when what waits will be done, against a simulation with a clock of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil

import pytest

from tuft.fairness import VirtualCounters
from tuft.service.forecast import Arrivals, Bias, Demand, Rate, seconds_until

UNIT = 1.0
"""What the simulated engine does at once."""


@dataclass
class Sender:
    """A tenant of the simulation: what waits at the beginning, and what comes a second."""

    name: str
    weight: float = 1.0
    waiting: float = 0.0
    arriving_per_s: float = 0.0
    head_start: float = 0.0

    @property
    def demand(self) -> Demand:
        return Demand(self.weight, self.head_start / self.weight, self.waiting, self.arriving_per_s)


def simulated(mine: Sender, others: Sequence[Sender], rate_per_s: float, lead_cost: float = 0.0) -> float:
    """Seconds until all that ``mine`` has waiting is computed, unit by unit, in the order of ``tuft.fairness``."""
    senders = {sender.name: sender for sender in (mine, *others)}
    counters = VirtualCounters({name: sender.weight for name, sender in senders.items()})
    for sender in senders.values():
        counters.charge(sender.name, sender.head_start)
    served = dict.fromkeys(senders, 0.0)
    now_s = lead_cost / rate_per_s
    while served[mine.name] < mine.waiting:
        here = {name: one.waiting + one.arriving_per_s * now_s - served[name] for name, one in senders.items()}
        wanting = [name for name, cost in here.items() if cost >= UNIT]
        next_served = min(wanting, key=counters.order)
        counters.charge(next_served, UNIT)
        served[next_served] += UNIT
        now_s += UNIT / rate_per_s
    return now_s


ALONE = Sender("mine", waiting=300)
MIXES: dict[str, tuple[Sender, list[Sender]]] = {
    "alone": (ALONE, []),
    "beside equals who want more": (ALONE, [Sender("a", waiting=5000), Sender("b", waiting=5000)]),
    "beside one who wants less": (ALONE, [Sender("a", waiting=50)]),
    "with a third of the weight": (ALONE, [Sender("a", weight=3, waiting=5000)]),
    "with three times the weight": (Sender("mine", weight=3, waiting=300), [Sender("a", waiting=5000)]),
    "behind one who was served more": (Sender("mine", waiting=300, head_start=200), [Sender("a", waiting=5000)]),
    "before one who was served more": (ALONE, [Sender("a", waiting=5000, head_start=200)]),
    "beside one who keeps sending a little": (ALONE, [Sender("a", waiting=20, arriving_per_s=30)]),
    "beside one who keeps sending much": (ALONE, [Sender("a", waiting=20, arriving_per_s=400)]),
    "beside everybody": (
        ALONE,
        [Sender("a", waiting=40), Sender("b", weight=2, waiting=4000), Sender("c", arriving_per_s=10, waiting=5)],
    ),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("lead_cost", [0.0, 80.0])
def test_what_is_told_is_what_the_fair_order_does(name: str, lead_cost: float) -> None:
    mine, others = MIXES[name]
    rate_per_s = 100.0
    told = seconds_until(mine.waiting, mine.demand, [other.demand for other in others], rate_per_s, lead_cost)
    assert told == pytest.approx(simulated(mine, others, rate_per_s, lead_cost), rel=0.03)


def test_nothing_before_it_is_only_itself() -> None:
    assert seconds_until(50.0, Demand(1.0, 0.0, 50.0), [], 100.0, 0.0) == pytest.approx(0.5)
    assert seconds_until(50.0, Demand(1.0, 0.0, 50.0), [Demand(1.0, 0.0, 0.0)], 100.0, 25.0) == pytest.approx(0.75)


def test_more_before_it_is_never_sooner() -> None:
    others = [Demand(2.0, 30.0, 100.0, 20.0), Demand(1.0, 0.0, 40.0)]
    told = [seconds_until(cost, Demand(1.0, 10.0, cost), others, 100.0, 5.0) for cost in range(1, 400, 7)]
    assert told == sorted(told)


def test_a_rate_is_unknown_before_anything_was_observed() -> None:
    assert Rate().value is None
    rate = Rate()
    rate.observe(0.0, 0.0)
    assert rate.value is None


def test_a_steady_rate_is_found_at_once_and_kept() -> None:
    rate = Rate()
    for _ in range(1000):
        rate.observe(30.0, 0.1)
        assert rate.value == pytest.approx(300.0)


def test_a_rate_forgets_half_of_what_was_in_a_half_life() -> None:
    rate = Rate(half_life=10.0)
    for _ in range(1000):
        rate.observe(1.0, 0.1)
    for _ in range(100):  # ten seconds
        rate.observe(3.0, 0.1)
    assert rate.value == pytest.approx(20.0, rel=0.02)


def test_long_observations_count_more_than_short_ones() -> None:
    rate = Rate(half_life=1e9)
    rate.observe(100.0, 1.0)
    rate.observe(100.0, 3.0)
    assert rate.value == pytest.approx(50.0)


@pytest.mark.parametrize("after_s", [5.0, 30.0, 300.0])
def test_a_steady_sender_is_known_as_one_from_the_beginning_on(after_s: float) -> None:
    arrivals = Arrivals()
    for number in range(ceil(after_s / 0.1) + 1):
        arrivals.note("a", 4.0, number * 0.1)
    assert arrivals.per_s("a", after_s) == pytest.approx(40.0, rel=0.05)


def test_who_stopped_sending_is_forgotten() -> None:
    arrivals = Arrivals(half_life_s=30.0)
    for second in range(300):
        arrivals.note("a", 10.0, float(second))
    assert arrivals.per_s("a", 299.0 + 30.0) == pytest.approx(arrivals.per_s("a", 299.0) / 2, rel=0.01)
    assert arrivals.per_s("a", 1299.0) < 1e-6
    assert arrivals.per_s("nobody", 299.0) == 0.0


def test_what_one_sends_is_not_anothers() -> None:
    arrivals = Arrivals()
    for second in range(100):
        arrivals.note("a", 10.0, float(second))
        arrivals.note("b", 30.0, float(second))
    assert arrivals.per_s("b", 99.0) == pytest.approx(3 * arrivals.per_s("a", 99.0))


def after(factors: Sequence[float], number: int) -> float:
    """What a second is told to be, once ``number`` waits took so many times what they were said to, in turn."""
    bias, numbers = Bias(), count()
    for _ in range(number):
        future = next(numbers)
        bias.said(f"future-{future}", 10.0, future * 100.0)
        bias.settled(f"future-{future}", future * 100.0 + 10.0 * factors[future % len(factors)])
    return bias.said("last", 1.0, 0.0)


def test_estimates_that_were_right_are_told_as_they_are() -> None:
    assert Bias().said("first", 7.0, 0.0) == 7.0
    assert after([1.0], 200) == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_estimates_that_are_always_wrong_alike_are_mended(factor: float) -> None:
    assert after([factor], 200) == pytest.approx(factor, rel=0.01)


def test_errors_both_ways_cancel() -> None:
    assert after([0.8, 1.25], 400) == pytest.approx(1.0, abs=0.02)


def test_a_freak_counts_no_more_than_a_factor_of_two() -> None:
    assert after([1000.0], 1) == pytest.approx(after([2.0], 1))
    assert after([0.001], 1) == pytest.approx(after([0.5], 1))


def test_the_first_estimate_of_a_future_is_the_one_that_is_judged() -> None:
    bias = Bias()
    bias.said("one", 10.0, 0.0)
    bias.said("one", 2.0, 8.0)
    bias.settled("one", 10.0)
    assert bias.said("next", 1.0, 20.0) == pytest.approx(1.0)


def test_what_was_never_told_teaches_nothing() -> None:
    bias = Bias()
    bias.settled("unknown", 50.0)
    bias.said("done already", 0.0, 0.0)
    bias.settled("done already", 50.0)
    assert bias.said("next", 1.0, 60.0) == 1.0
