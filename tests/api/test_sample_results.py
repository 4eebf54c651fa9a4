"""What we encode of a sample is what the SDK decodes."""

from __future__ import annotations

import json
import math

import numpy as np
import tinker
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types.sample_response import SampleResponse

from tuft.api import results
from tuft.types import Matrix, SampledSequence, SampleResult, TokenLogprobs


def floats(*rows: object) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


SEQUENCES = (
    SampledSequence(np.array([5, 2]), floats(-0.5, -1.0), "stop"),
    SampledSequence(
        np.array([7]), floats(-0.25), "length", TokenLogprobs(np.array([[7, 9, 1]]), floats([-0.25, -2.0, -4.0]))
    ),
)
SPARSE = Matrix(floats(-3.0, -0.5), (2, 4), crow=np.array([0, 0, 2]), col=np.array([1, 3]))
RESULT = SampleResult(
    SEQUENCES,
    prompt_logprobs_P=floats(math.nan, -2.0, -1.5),
    topk_prompt=TokenLogprobs(
        np.array([[0, 0], [0, 0], [3, 4]]), floats([-99999.0, -99999.0], [-99999.0, -99999.0], [-0.5, -1.5])
    ),
    target_prompt_logprobs=SPARSE,
    prompt_alternatives=TokenLogprobs(np.array([[8, 9], [8, 8]]), floats([-1.0, -2.0], [-0.125, -0.125])),
    prompt_cache_hit_tokens=128,
)


def decoded(result: SampleResult) -> SampleResponse:
    return deserialize_sample_response(results.encode_proto(result))


def test_the_sdk_reads_back_the_sequences() -> None:
    first, second = decoded(RESULT).sequences
    assert (first.tokens, first.logprobs, first.stop_reason) == ([5, 2], [-0.5, -1.0], "stop")
    assert (second.tokens, second.logprobs, second.stop_reason) == ([7], [-0.25], "length")
    assert first.topk_logprobs is None
    assert second.topk_logprobs == [[(7, -0.25), (9, -2.0), (1, -4.0)]]


def test_the_sdk_reads_back_what_was_asked_about_the_prompt() -> None:
    response = decoded(RESULT)
    assert response.prompt_logprobs == [None, -2.0, -1.5]
    assert response.topk_prompt_logprobs == [None, None, [(3, -0.5), (4, -1.5)]]
    assert response.prompt_cache_hit_tokens == 128
    assert response.prompt_alt_tokens is not None
    tokens, logprobs = response.prompt_alt_tokens.tokens, response.prompt_alt_tokens.logprobs
    assert (tokens.dtype, tokens.tolist()) == ("int64", [[8, 9], [8, 8]])
    assert (logprobs.dtype, logprobs.tolist()) == ("float32", [[-1.0, -2.0], [-0.125, -0.125]])


def test_targets_come_back_in_the_layout_in_which_they_were_asked() -> None:
    listed = decoded(RESULT).target_prompt_logprobs
    assert listed is not None
    assert (listed.shape, listed.data) == ([2, 4], [-3.0, -0.5])
    assert (listed.sparse_crow_indices, listed.sparse_col_indices) == ([0, 0, 2], [1, 3])
    dense = Matrix(floats(-3.0, 0.0, 0.0, -0.5), (2, 2))
    found = decoded(SampleResult(SEQUENCES, target_prompt_logprobs=dense)).target_prompt_logprobs
    assert found is not None
    assert found.sparse_crow_indices is None
    assert (found.dtype, found.tolist()) == ("float32", [[-3.0, 0.0], [0.0, -0.5]])


def test_a_sample_in_json_says_the_same() -> None:
    in_json = json.loads(results.encode_json(RESULT))
    assert in_json.pop("sequences") == [
        {"stop_reason": "stop", "tokens": [5, 2], "logprobs": [-0.5, -1.0]},
        {
            "stop_reason": "length",
            "tokens": [7],
            "logprobs": [-0.25],
            "topk_logprobs": [[[7, -0.25], [9, -2.0], [1, -4.0]]],
        },
    ]
    in_proto = decoded(RESULT)
    targets, alternatives = in_json.pop("target_prompt_logprobs"), in_json.pop("prompt_alt_tokens")
    assert tinker.TensorData(**targets).tolist() == [[0.0, 0.0, 0.0, 0.0], [0.0, -3.0, 0.0, -0.5]]
    assert in_proto.prompt_alt_tokens is not None
    for name in ("tokens", "logprobs"):
        expected: tinker.TensorData = getattr(in_proto.prompt_alt_tokens, name)
        found = tinker.TensorData(**alternatives[name])
        assert (found.dtype, found.shape, found.tolist()) == (expected.dtype, expected.shape, expected.tolist())
    assert in_json == {
        "type": "sample",
        "prompt_logprobs": [None, -2.0, -1.5],
        "topk_prompt_logprobs": [None, None, [[3, -0.5], [4, -1.5]]],
        "prompt_cache_hit_tokens": 128,
    }


def test_what_was_not_asked_for_is_absent() -> None:
    bare = SampleResult(SEQUENCES[:1])
    response = decoded(bare)
    assert response.prompt_logprobs is None
    assert response.topk_prompt_logprobs is None
    assert response.target_prompt_logprobs is None
    assert response.prompt_alt_tokens is None
    in_json = json.loads(results.encode_json(bare))
    assert set(in_json) == {"type", "sequences", "prompt_cache_hit_tokens"}
    assert set(in_json["sequences"][0]) == {"stop_reason", "tokens", "logprobs"}
