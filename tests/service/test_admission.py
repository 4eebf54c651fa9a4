"""Which samples the engine gets: a pure decision."""

from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np
import pytest

from tuft.fairness import Costs, VirtualCounters, jain_index
from tuft.service.admission import SampleLine, WaitingSample
from tuft.types import SampledSequence, SampleResult

MAX_ROWS = 8


class Rig:
    """A line, and an engine that ends samples one by one, each with as many tokens as it may have."""

    def __init__(self, **weights: float) -> None:
        self.counters = VirtualCounters(weights)
        self.line = SampleLine(self.counters, Costs(), MAX_ROWS, max_tokens=10_000)
        self.now_s = 0.0
        self.served: Counter[str] = Counter()
        self._ids = count()

    def put(self, tenant: str, number: int, num_rows: int = 1, max_new: int = 10) -> None:
        for _ in range(number):
            sample = WaitingSample(tenant, f"s:{next(self._ids)}", "model", 5, num_rows, max_new)
            self.line.put(sample, self.now_s)

    def step(self) -> list[str]:
        """The engine ends the sample that began first; returns the tenants of those that begin."""
        begun = [sample.tenant_id for sample in self.line.take(self.now_s)]
        if self.line.started:
            self.now_s += 1.0
            first = next(iter(self.line.started.values()))
            tokens = np.zeros(first.max_new, np.int64)
            sequence = SampledSequence(tokens, tokens.astype(np.float32), "length")
            self.line.ended(first, SampleResult((sequence,) * first.num_rows), self.now_s)
            self.served[first.tenant_id] += first.num_rows * first.max_new
        return begun


def test_the_engine_gets_what_it_can_decode_and_a_little_more() -> None:
    rig = Rig()
    rig.put("a", 1000)
    assert len(rig.line.take(0.0)) == MAX_ROWS * 1.25


def test_one_of_few_does_not_wait_for_the_thousands_of_another() -> None:
    rig = Rig()
    rig.put("crowd", 10_000)
    for _ in range(20):
        rig.step()
    rig.put("one", 1)
    assert rig.step() == ["one"] or rig.step() == ["one"]


def test_equal_weights_get_equal_shares() -> None:
    rig = Rig()
    for tenant in ("a", "b", "c"):
        rig.put(tenant, 400)
    for _ in range(300):
        rig.step()
    assert jain_index(rig.served.values()) > 0.99


def test_a_weight_of_three_gets_three_times_as_much() -> None:
    rig = Rig(a=1.0, b=3.0)
    rig.put("a", 1000)
    rig.put("b", 1000)
    for _ in range(400):
        rig.step()
    assert rig.served["b"] / rig.served["a"] == pytest.approx(3.0, rel=0.1)


def test_whoever_is_alone_gets_everything() -> None:
    rig = Rig()
    rig.put("a", 50, max_new=10)
    for _ in range(50):
        rig.step()
    assert rig.served["a"] == 500


def test_one_that_is_not_wanted_any_more_leaves_its_place() -> None:
    rig = Rig()
    rig.put("a", 12)
    (last,) = [samples[-1] for samples in rig.line.all_waiting.values()]
    rig.line.remove(last)
    first = rig.line.take(0.0)[0]
    rig.line.remove(first)
    assert len(rig.line.take(0.0)) == 1
