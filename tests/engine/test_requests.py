"""What a request and its continuations may come to need, and how they draw and end."""

from __future__ import annotations

import pytest

from tests.models.tiny import tiny_tokenizer
from tuft.engine.base import Sample
from tuft.engine.prompt_scores import PromptScores
from tuft.engine.requests import Continuation, Request
from tuft.engine.sampling import StopRule, uniforms
from tuft.types import SampleSpec, SamplingParams


def make_request(num_prompt: int, max_new: int, stop: tuple[int, ...] = ()) -> Request:
    spec = SampleSpec(tuple(range(num_prompt)), SamplingParams(max_new, seed=3, temperature=0.5))
    rule = StopRule(stop, (), tiny_tokenizer().backend_tokenizer, spec.prompt_tokens)
    return Request("key", Sample("tiny", None, spec), None, 3, max_new, rule, PromptScores(spec, 3))


@pytest.mark.parametrize(
    ("num_prompt", "max_new", "expected"),
    [(16, 1, 0), (20, 1, 0), (16, 2, 1), (16, 17, 1), (16, 18, 2), (20, 2, 1), (20, 13, 1), (20, 14, 2)],
)
def test_a_continuation_needs_pages_for_all_tokens_but_the_last(num_prompt: int, max_new: int, expected: int) -> None:
    assert make_request(num_prompt, max_new).pages_per_continuation == expected


def test_each_token_has_the_uniform_of_its_position() -> None:
    one = Continuation(make_request(20, 200), index=2, num_reserved=0)
    seen = []
    for _ in range(150):
        seen.append(one.next_draw())
        one.take(7, -1.0)
    assert [draw.uniform for draw in seen] == uniforms(3, 2, 20, 150)
    assert {(draw.temperature, draw.top_k, draw.top_p) for draw in seen} == {(0.5, -1, 1.0)}


def test_a_continuation_says_why_it_ends() -> None:
    one = Continuation(make_request(5, 3, stop=(9,)), index=0, num_reserved=0)
    assert [one.take(token, -1.0) for token in (1, 2, 3)] == [None, None, "length"]
    other = Continuation(make_request(5, 3, stop=(9,)), index=0, num_reserved=0)
    assert [other.take(token, -1.0) for token in (1, 9)] == [None, "stop"]
