"""Variants in processes of their own: in turns, and with their errors told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from bench.measure import Compute, Figures, Measured, Variant, measure


@contextmanager
def clock(left: Path | None = None) -> Iterator[Compute]:
    """Tells when it was asked, and what OpenMP's threads do in its process."""

    def compute(case: str, warm_up: bool) -> Figures:
        if case == "broken":
            raise ValueError("cannot compute this")
        if case == "deadly":
            os._exit(3)
        spin = os.environ.get("GOMP_SPINCOUNT", "0")
        return {"seconds": [time.monotonic()], "warm": [float(warm_up)], "spin": [float(spin)]}

    yield compute
    if left is not None:
        left.touch()


def test_cases_and_variants_take_turns_after_all_are_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    left = tmp_path / "left"
    variants = {
        "a": Variant(partial(clock, left), ("x", "y"), {"GOMP_SPINCOUNT": "5"}),
        "b": Variant(clock, ("x",)),
    }
    measured = measure(variants, [["x", "y"]], rounds=2)
    keys = [("x", "a"), ("x", "b"), ("y", "a")]
    assert list(measured.first) == list(measured.rounds) == keys
    times = [measured.first[key]["seconds"][0] for key in keys]
    times += [measured.rounds[key]["seconds"][number] for number in range(2) for key in keys]
    assert times == sorted(times)
    assert [measured.first[key]["warm"] for key in keys] == [[1.0]] * 3
    assert [measured.rounds[key]["warm"] for key in keys] == [[0.0, 0.0]] * 3
    assert measured.median(("x", "a"), "spin") == 5
    assert measured.median(("x", "b"), "spin") == 0  # a baseline has OpenMP's own defaults
    assert os.environ["GOMP_SPINCOUNT"] == "77"
    assert left.exists()  # the block was left before the process ended


@pytest.mark.parametrize(("case", "told"), [("broken", "cannot compute this"), ("deadly", "exit status 3")])
def test_a_variant_that_fails_is_told_with_its_name(case: str, told: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)^fragile: .*{told}"):
        measure({"fragile": Variant(clock, (case,))}, [[case]], rounds=1)


def test_ratios_are_of_neighbours_and_percentiles_of_all() -> None:
    slow, fast = ("case", "slow"), ("case", "fast")
    measured = Measured({}, {slow: {"seconds": [2.0, 30.0, 8.0]}, fast: {"seconds": [1.0, 10.0, 2.0]}})
    assert measured.ratio(slow, fast) == 3.0
    many = Measured({}, {fast: {"seconds": [float(n) for n in range(100, 0, -1)]}})
    assert [many.percentile(fast, percent) for percent in (0, 50, 95, 100)] == [1, 50, 95, 100]
