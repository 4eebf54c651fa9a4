"""The counters under a virtual clock: an engine that serves one part at a time, for as long as the part costs."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuft.fairness import Costs, VirtualCounters, jain_index

TENANTS = "abcd"


@dataclass
class Engine:
    """``arrivals``: (moment, tenant, costs of the parts of one request), by moment."""

    counters: VirtualCounters
    arrivals: deque[tuple[float, str, list[float]]]
    now: float = 0.0
    idle: float = 0.0
    waiting: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    served: Counter[str] = field(default_factory=Counter)
    wanted_since: dict[str, float] = field(default_factory=dict)

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, tenant_id, parts = self.arrivals.popleft()
            self.waiting[tenant_id].extend(parts)
            self.wanted_since.setdefault(tenant_id, self.now)

    def step(self) -> str | None:
        """Serve one part; who got it, None when all is done."""
        self._arrive()
        ready = [tenant_id for tenant_id, parts in self.waiting.items() if parts]
        self.counters.now_want("work", ready)
        if not ready:
            if not self.arrivals:
                return None
            self.idle += self.arrivals[0][0] - self.now
            self.now = self.arrivals[0][0]
            return self.step()
        chosen = min(ready, key=self.counters.order)
        cost = self.waiting[chosen].popleft()
        self.counters.charge(chosen, cost)
        self.now += cost
        self.served[chosen] += cost
        if not self.waiting[chosen]:
            del self.wanted_since[chosen]
        return chosen


_part = st.integers(1, 100)
_requests = st.lists(
    st.tuples(st.integers(0, 2000), st.sampled_from(TENANTS), st.lists(_part, min_size=1, max_size=30)), max_size=30
)
_weights = st.fixed_dictionaries(dict.fromkeys(TENANTS, st.sampled_from([0.5, 1.0, 2.0, 3.0])))


def engine(requests: list[tuple[int, str, list[int]]], weights: dict[str, float], credit: float = 0.0) -> Engine:
    arrivals = deque((float(moment), tenant, [float(part) for part in parts]) for moment, tenant, parts in requests)
    return Engine(VirtualCounters(weights, credit), deque(sorted(arrivals, key=lambda item: item[0])))


@given(_requests, _weights, st.sampled_from([0.0, 50.0]))
def test_the_gap_between_two_who_want_something_all_the_time_keeps_its_bound(
    requests: list[tuple[int, str, list[int]]], weights: dict[str, float], credit: float
) -> None:
    """At every step, for every pair, from every earlier moment since which both have wanted something."""
    rig = engine(requests, weights, credit)
    bound = 2 * (100 / min(weights.values()) + credit)
    history: list[tuple[float, dict[str, float]]] = [(0.0, {})]
    while rig.step() is not None:
        history.append((rig.now, dict(rig.served)))
        for number, first in enumerate(TENANTS):
            for second in TENANTS[number + 1 :]:
                if first not in rig.wanted_since or second not in rig.wanted_since:
                    continue
                since = max(rig.wanted_since[first], rig.wanted_since[second])
                for moment, before in history:
                    if moment >= since:
                        had = [
                            (rig.served[tenant] - before.get(tenant, 0.0)) / weights[tenant]
                            for tenant in (first, second)
                        ]
                        assert abs(had[0] - had[1]) <= bound + 1e-6


@given(_requests, _weights)
def test_the_engine_is_idle_only_when_nobody_wants_anything(
    requests: list[tuple[int, str, list[int]]], weights: dict[str, float]
) -> None:
    rig = engine(requests, weights, credit=50.0)
    while rig.step() is not None:
        pass
    assert rig.served.total() == sum(sum(parts) for _, _, parts in requests)
    busy_until = idle = 0.0  # of an engine that knows no tenants at all
    for moment, _, parts in sorted(requests, key=lambda item: item[0]):
        idle += max(0.0, moment - busy_until)
        busy_until = max(busy_until, moment) + sum(parts)
    assert rig.idle == pytest.approx(idle)


@given(st.integers(1, 100), _part, st.floats(0.0, 100.0))
def test_idling_saves_up_no_more_than_the_credit(num_before: int, part: int, credit: float) -> None:
    """However long it idled, a newcomer is ahead of one who always worked by its credit and a part."""
    requests = [(0, "a", [part] * 200), (num_before * part, "b", [part] * 200)]
    rig = engine(requests, dict.fromkeys(TENANTS, 1.0), credit)
    for _ in range(num_before):
        assert rig.step() == "a"
    start = rig.served["a"]
    for _ in range(50):
        rig.step()
        assert rig.served["b"] - (rig.served["a"] - start) <= credit + 2 * part + 1e-6


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.25])
def test_services_are_as_the_weights(weight: float) -> None:
    rig = engine([(0, "a", [7] * 4000), (0, "b", [11] * 4000)], {"a": 1.0, "b": weight})
    while rig.now < 10_000:
        rig.step()
    assert rig.served["b"] / rig.served["a"] == pytest.approx(weight, rel=0.02)


def test_equal_weights_are_served_alike_whatever_the_sizes_of_requests() -> None:
    rig = engine(
        [(0, name, [size] * (20_000 // size)) for name, size in zip(TENANTS, (1, 10, 50, 100), strict=True)], {}
    )
    while rig.now < 20_000:
        rig.step()
    assert jain_index(rig.served.values()) > 0.999


def test_who_comes_for_a_little_is_next_even_before_one_of_the_same_level() -> None:
    counters = VirtualCounters()
    counters.now_want("work", ["a"])
    counters.charge("a", 100)
    counters.now_want("work", ["a", "b"])
    assert counters.level("a") == counters.level("b")
    assert min("ab", key=counters.order) == "b"


def test_one_who_waits_for_results_between_requests_keeps_its_weight() -> None:
    """One request at a time, each idle for a moment behind it: the credit bridges that."""
    counters = VirtualCounters({"a": 3.0}, credit=100)
    counters.now_want("work", ["a", "b"])
    served: Counter[str] = Counter()
    ready = {"a", "b"}
    for _ in range(400):
        chosen = min(ready, key=counters.order)
        counters.charge(chosen, 10)
        served[chosen] += 10
        counters.now_want("work", {"a", "b"} - {chosen})  # its next request comes when this one has been answered
        counters.now_want("work", ready)
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=0.05)


def test_an_estimate_is_corrected_once_the_cost_is_known() -> None:
    counters = VirtualCounters({"a": 2.0})
    counters.charge("a", 100)
    counters.charge("a", -60)
    assert counters.level("a") == 20


def test_kinds_of_work_share_one_counter() -> None:
    counters = VirtualCounters()
    counters.now_want("training", ["a", "b"])
    counters.now_want("sampling", ["a"])
    counters.charge("a", 50)
    assert min("ab", key=counters.order) == "b"
    counters.now_want("training", [])
    assert (counters.wanting("training"), counters.wanting("sampling")) == ([], ["a"])


def test_accounts_that_hold_nothing_are_dropped() -> None:
    counters = VirtualCounters()
    for number in range(100):
        counters.now_want("work", [f"guest-{number}", "host"])
        counters.charge("host", 1)
    counters.now_want("work", ["host"])
    counters.charge("host", 1)
    counters.forget_idle()
    assert counters.num_accounts == 1


def test_jain_index_says_how_equal_services_are() -> None:
    assert jain_index([5, 5, 5]) == 1.0
    assert jain_index([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain_index([]) == jain_index([0, 0]) == 1.0


def test_a_token_costs_what_it_takes_the_engine() -> None:
    costs = Costs()
    assert 0 < costs.forward < costs.prefill < costs.decode < costs.forward_backward
