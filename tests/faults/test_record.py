from __future__ import annotations

from faults.record import Record, quantile


def test_a_record_says_what_does_not_hold() -> None:
    kept = Record("waiting", "held poll", 10, 0, {"p99_ms": 12.5})
    assert kept.holds
    assert str(kept).splitlines() == ["waiting: held poll x 10, lost 0", "    p99_ms 12.5", "    holds"]
    lost = Record("waiting", "held poll", 10, 2, {}, ("it was slow",))
    assert not lost.holds
    assert str(lost).endswith("BROKEN: it was slow; 2 lost")


def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0] * 99 + [7.0], 0.99) == 1.0
    assert quantile([1.0] * 98 + [7.0] * 2, 0.99) == 7.0
    assert quantile([1.0] * 19 + [7.0], 0.95) == 1.0
    assert quantile([1.0] * 19 + [7.0], 0.96) == 7.0
    assert quantile([], 0.99) == 0.0
