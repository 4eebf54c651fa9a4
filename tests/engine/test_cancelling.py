"""A sample that is cancelled leaves no trace: its pages are free, and the others say what they say without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_sampler import (
    ENDLESS,
    assert_same,
    make_adapter,
    make_sampler,
    prompt_of,
    run_one,
    sample_of,
    tiny_decoder,
)
from tuft.engine.base import Sample
from tuft.errors import UserError
from tuft.types import SampleResult


def endless(name: str, length: int, num_samples: int = 1) -> Sample:
    return replace(sample_of(prompt_of(length, len(name)), ENDLESS, num_samples), sample_id=name)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
def test_the_others_have_the_same_bits_wherever_a_sample_is_cancelled(num_steps: int) -> None:
    decoder, adapter = tiny_decoder(), make_adapter(tiny_decoder())
    kept = [endless("before", 40, 2), endless("after", 300)]
    sampler = make_sampler(decoder)
    outcomes: dict[Any, object] = {}
    for key, command in (("before", kept[0]), ("leaves", endless("leaves", 300, 3)), ("after", kept[1])):
        sampler.add(key, command, adapter)
    for _ in range(num_steps):
        outcomes.update(sampler.step())
    ((key, outcome),) = sampler.cancel("leaves")
    assert key == "leaves"
    assert isinstance(outcome, UserError)
    assert sampler.cancel("leaves") == sampler.cancel("nobody") == []
    while sampler.active:
        outcomes.update(sampler.step())
    assert set(outcomes) == {"before", "after"}
    for command in kept:
        actual = outcomes[command.sample_id]
        assert isinstance(actual, SampleResult)
        assert_same(actual, run_one(decoder, command, adapter))


def test_all_pages_are_free_after_a_cancellation_at_any_step() -> None:
    sampler = make_sampler(tiny_decoder(), kv_cache_tokens=512, max_decode_rows=2)
    num_pages = sampler._cache.num_takeable
    for num_steps in range(8):
        sampler.add("running", endless("running", 140, 2), None)
        sampler.add("half started", endless("half started", 30, 4), None)
        sampler.add("waiting", endless("waiting", 30), None)
        for _ in range(num_steps):
            assert sampler.step() == []
        for name in ("half started", "running", "waiting"):
            assert [key for key, _ in sampler.cancel(name)] == [name]
        assert not sampler.active
        assert sampler._cache.num_takeable == num_pages


def test_a_sample_that_waits_behind_a_cancelled_one_takes_its_place() -> None:
    sampler = make_sampler(tiny_decoder(), max_decode_rows=1)
    sampler.add("first", endless("first", 5), None)
    sampler.add("second", endless("second", 5), None)
    sampler.step()
    sampler.cancel("first")
    outcomes = [outcome for _ in range(ENDLESS.max_tokens or 0) for outcome in sampler.step()]
    assert [key for key, _ in outcomes] == ["second"]
