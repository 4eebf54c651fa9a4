"""Every option of a sample request: what is refused, by name and with what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tuft.config import LimitsSection
from tuft.errors import InvalidInput
from tuft.service.sampling_checks import check_sampling
from tuft.types import BaseModelInfo, Matrix, PromptScoring, SampleSpec, SamplingParams

LIMITS = LimitsSection()
MODEL = BaseModelInfo("tiny", (), "LlamaForCausalLM", 100, 16, 1000, "float32", (2,), "/tmp", {})
LARGE = BaseModelInfo("large", (), "LlamaForCausalLM", 50_000, 100_000, 1000, "float32", (2,), "/tmp", {})
"""A long context and many tokens."""


def spec(num_prompt: int = 3, num_samples: int = 1, topk_logprobs: int = 0, **scoring: Any) -> SampleSpec:
    return SampleSpec((1,) * num_prompt, SamplingParams(), num_samples, topk_logprobs, PromptScoring(**scoring))


def targets(ids: list[list[int]]) -> Matrix:
    array = np.asarray(ids, dtype=np.int64)
    return Matrix(array.ravel(), array.shape)  # type: ignore[arg-type]


def refused(asked: SampleSpec, model: BaseModelInfo = MODEL) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_sampling(asked, model, LIMITS)
    return str(caught.value)


def test_what_can_be_honoured_passes() -> None:
    check_sampling(SampleSpec((1, 99), SamplingParams(stop=("é" * 512, "x"), temperature=0)), MODEL, LIMITS)
    everything = {"logprobs": True, "topk": 100, "last_n": 2, "num_alternatives": 100, "targets": targets([[-1], [99]])}
    check_sampling(spec(3, 2, 100, **everything), MODEL, LIMITS)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1; must be 0 (greedy), or 0.0001 to 10000"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0.0}, "top_p: got 0.0; must be above 0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"top_k": 0}, "top_k: got 0; must be at least 1, or -1"),
        ({"max_tokens": 0}, "max_tokens: got 0; must be at least 1"),
        ({"stop": ("",)}, "stop: got ''; strings must have 1 to 1024 bytes"),
        ({"stop": ("é" * 513,)}, "stop: got 'éé"),
        ({"stop": (100,)}, "stop: got 100; token ids of tiny are 0 to 99"),
        ({"stop": (5,) * 65}, "stop: got '65 of them'; must be at most 64"),
    ],
)
def test_bad_sampling_parameters_are_named(change: dict[str, Any], complaint: str) -> None:
    assert refused(SampleSpec((1,), SamplingParams(**change))).startswith(f"sampling_params.{complaint}")


def test_a_prompt_outside_the_vocabulary_is_refused() -> None:
    assert refused(SampleSpec((1, 100))).startswith("prompt[1]: got 100")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (spec(num_samples=0), "num_samples: got 0; must be 1 to 128"),
        (spec(topk_logprobs=-1), "topk_sample_logprobs: got -1; must be 0 to 100"),
        (spec(topk=101), "topk_prompt_logprobs: got 101; must be 0 to 100"),
        (spec(num_alternatives=-1), "prompt_alt_tokens_k: got -1; must be 0 to 100"),
        (spec(last_n=1), "prompt_logprobs_last_n: got 1; applies to prompt logprobs: set prompt_logprobs"),
        (spec(last_n=0, logprobs=True), "prompt_logprobs_last_n: got 0; must be 1 to 2 for a prompt of 3 tokens"),
        (spec(last_n=3, logprobs=True), "prompt_logprobs_last_n: got 3; must be 1 to 2"),
        (spec(targets=targets([[1]])), "target_prompt_logprobs.shape: got [1, 1]; must have 2 rows"),
        (spec(targets=targets([[1], [100]])), "target_prompt_logprobs.data[1]: got 100; must be -1 (nothing), or a"),
        (spec(targets=targets([[1], [-2]])), "target_prompt_logprobs.data[1]: got -2"),
        (spec(targets=targets([[-1], [-1]])), "target_prompt_logprobs: got 'no id'; must name at least one"),
        (
            spec(targets=Matrix(np.ones(2, np.float32), (2, 1))),
            "target_prompt_logprobs.dtype: got 'float32'; must be i",
        ),
        (spec(1, targets=Matrix(np.empty(0, np.int64), (0, 3))), "target_prompt_logprobs: got 'no id'"),
        (
            spec(targets=Matrix(np.array([1]), (2, 2000), np.array([0, 1, 1]), np.array([1999]))),
            "target_prompt_logprobs.shape: got [2, 2000]; must have at most 1024 columns",
        ),
    ],
)
def test_what_is_asked_about_tokens_is_checked(asked: SampleSpec, complaint: str) -> None:
    assert refused(asked).startswith(complaint)


def test_more_logprobs_than_a_response_may_hold_are_refused_before_they_are_computed() -> None:
    of_prompt = "must be at most 209 for 20000 prompt tokens (limits.max_logprobs: 4194304)"
    assert refused(spec(20_000, topk=210), LARGE) == f"topk_prompt_logprobs: got 210; {of_prompt}"
    assert refused(spec(20_000, num_alternatives=210), LARGE) == f"prompt_alt_tokens_k: got 210; {of_prompt}"
    ids = Matrix(np.ones(19_999 * 210, np.int64), (19_999, 210))
    assert refused(spec(20_000, targets=ids), LARGE).startswith("target_prompt_logprobs.data: got '4199790 ids'; must")
    assert refused(spec(20_000, 10, topk_logprobs=6), LARGE).startswith(
        "topk_sample_logprobs: got 6; must be at most 5 for 800000 sampled tokens"
    )
    check_sampling(SampleSpec((1,), SamplingParams(max_tokens=4096), 1, LIMITS.max_logprobs // 4096), LARGE, LIMITS)
