"""Sampling sessions and samples over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types import SampleRequest, SamplingParams

from tests.api.calls import BASE_MODEL, TOKENS, cross_entropy, post, result, settled
from tests.api.conftest import Served
from tuft.api import sampling as api
from tuft.api.wire import TEXT_ONLY

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": TOKENS[:2]}, {"tokens": TOKENS[2:]}]}


def asample(server: Served, sampler_id: str, seq_id: int = 0, **fields: Any) -> Any:
    request = {"prompt": PROMPT, "sampling_params": {"max_tokens": 3, "seed": 7}, **fields}
    return post(server.alice, "asample", sampling_session_id=sampler_id, seq_id=seq_id, **request)


def test_a_sampler_is_described_as_it_was_made(server: Served, sampler_id: str) -> None:
    expected = {"sampler_id": sampler_id, "base_model": BASE_MODEL, "model_path": None}
    assert server.alice.get(f"/api/v1/samplers/{sampler_id}").json() == expected


def test_a_sample_comes_as_asked_in_either_format(server: Served, sampler_id: str) -> None:
    targets = {"data": [7, 9], "dtype": "int64", "shape": [4, 2]}
    sparse = {"sparse_crow_indices": [0, 1, 1, 1, 2], "sparse_col_indices": [0, 1]}
    submitted = asample(
        server,
        sampler_id,
        num_samples=2,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs={**targets, **sparse},
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=3,
        record_stability_info=False,
    )
    assert len(submitted.json()["sample_sequence_ids"]) == 2
    in_json = result(server.alice, submitted)
    accept = {"Accept": "application/x-protobuf"}
    in_proto = deserialize_sample_response(settled(server.alice, submitted.json()["request_id"], **accept).content)
    assert len(in_json["sequences"]) == len(in_proto.sequences) == 2
    for a, b in zip(in_json["sequences"], in_proto.sequences, strict=True):
        assert (a["tokens"], a["logprobs"], a["stop_reason"]) == (b.tokens, b.logprobs, b.stop_reason)
        assert 1 <= len(a["tokens"]) <= 3
        assert a["topk_logprobs"] == [[list(cell) for cell in row or []] for row in b.topk_logprobs or []]
    assert in_json["prompt_logprobs"] == in_proto.prompt_logprobs
    assert [logprob is None for logprob in in_json["prompt_logprobs"]] == [True, True, False, False, False]
    topk = in_proto.topk_prompt_logprobs
    assert topk is not None
    assert in_json["topk_prompt_logprobs"] == [row and [list(cell) for cell in row] for row in topk]
    assert [row and len(row) for row in topk] == [None, None, 2, 2, 2]
    of_targets = in_proto.target_prompt_logprobs
    assert of_targets is not None
    assert in_json["target_prompt_logprobs"] == {
        **sparse,
        "data": of_targets.data,
        "dtype": "float32",
        "shape": [4, 2],
    }
    alternatives = in_proto.prompt_alt_tokens
    assert alternatives is not None
    assert in_json["prompt_alt_tokens"]["tokens"]["data"] == alternatives.tokens.data
    assert in_json["prompt_alt_tokens"]["logprobs"]["data"] == alternatives.logprobs.data
    assert alternatives.tokens.shape == [4, 2]
    assert in_json["prompt_cache_hit_tokens"] == in_proto.prompt_cache_hit_tokens


def test_every_option_of_the_newest_sdk_is_read() -> None:
    """What each one does is in tests/e2e/test_sampling_options.py."""
    ours, of_params = set(api.Sample.model_fields), set(api.SamplingFields.model_fields)
    assert set(SampleRequest.model_fields) - {"type"} == ours
    assert set(SamplingParams.model_fields) == of_params


def test_a_retry_of_a_seq_gets_the_same_sample(server: Served, sampler_id: str) -> None:
    first, second = (asample(server, sampler_id, seq_id=5_000_000_000).json() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("stop", [None, [], "xyz", ["xyz", "abc"], [5, 6]])
def test_every_way_to_write_stop_is_understood(server: Served, sampler_id: str, stop: Any) -> None:
    submitted = asample(server, sampler_id, sampling_params={"max_tokens": 2, "stop": stop})
    assert len(result(server.alice, submitted)["sequences"]) == 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"topk_sample_logprobs": 1025}, "topk_sample_logprobs: got 1025; must be 0 to 384"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs: got -1; must be 0 to 384"),
        ({"prompt_alt_tokens_k": "2"}, "prompt_alt_tokens_k: got '2'; must be a valid integer"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n: got 1; applies to prompt logprobs"),
        ({"prompt_logprobs_last_n": 5, "prompt_logprobs": True}, "prompt_logprobs_last_n: got 5; must be 1 to 4"),
        ({"record_stability_info": "yes"}, "record_stability_info: got 'yes'; must be a valid boolean"),
        ({"target_prompt_logprobs": {"data": [1]}}, "target_prompt_logprobs.dtype: got None; must be 'float32' or"),
        (
            {"target_prompt_logprobs": {"data": [1, 2, 3, 4], "dtype": "int64"}},
            "target_prompt_logprobs.shape: got [4]; must be [prompt tokens - 1, K]",
        ),
        (
            {"target_prompt_logprobs": {"data": [1.0] * 4, "dtype": "float32", "shape": [4, 1]}},
            "target_prompt_logprobs.dtype: got 'float32'; must be int64",
        ),
        ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, f"prompt.chunks[0].type: got 'image'; {TEXT_ONLY}"),
        (
            {"prompt": {"chunks": [{"type": "image_asset_pointer"}]}},
            f"prompt.chunks[0].type: got 'image_asset_pointer'; {TEXT_ONLY}",
        ),
        ({"prompt": {"chunks": [{"type": "dmel"}]}}, f"prompt.chunks[0].type: got 'dmel'; {TEXT_ONLY}"),
        ({"prompt": {"chunks": [{"tokens": ["a"]}]}}, "prompt.chunks[0].tokens: got 'a'; must be a list of 64-bit"),
        ({"prompt": None}, "prompt: got None; must be an object"),
        ({"prompt": {"chunks": [{"tokens": [99999]}]}}, "prompt[0]: got 99999"),
        ({"num_samples": 5}, "num_samples: got 5; must be 1 to 4"),
        ({"sampling_params": {"stop": ["a", 1]}}, "sampling_params.stop: got ['a', 1]; must be a string, a list"),
        ({"sampling_params": {"temperature": "hot"}}, "sampling_params.temperature: got 'hot'; must be a valid number"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p: got 0.0"),
        ({"seq_id": -1}, "seq_id: got -1; must be greater than or equal to 0"),
    ],
)
def test_a_wrong_sample_is_refused_at_once(
    server: Served, sampler_id: str, fields: dict[str, Any], complaint: str
) -> None:
    response = asample(server, sampler_id, **fields)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(complaint)


def test_saved_weights_can_be_sampled_named_and_unnamed(server: Served, session_id: str, run_id: str) -> None:
    named = result(
        server.alice, post(server.alice, "save_weights_for_sampler", model_id=run_id, seq_id=1, path="frozen")
    )
    assert named["path"] == f"tinker://{run_id}/sampler_weights/frozen"
    unnamed = result(
        server.alice,
        post(server.alice, "save_weights_for_sampler", model_id=run_id, seq_id=2, sampling_session_seq_id=1),
    )
    assert unnamed["path"] is None
    created = post(
        server.alice,
        "create_sampling_session",
        session_id=session_id,
        sampling_session_seq_id=2,
        model_path=named["path"],
    ).json()
    described = server.alice.get(f"/api/v1/samplers/{created['sampling_session_id']}").json()
    assert (described["base_model"], described["model_path"]) == (BASE_MODEL, named["path"])
    samples = [
        result(server.alice, asample(server, sampler_id))["sequences"]
        for sampler_id in (created["sampling_session_id"], unnamed["sampling_session_id"])
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 400),
        ({"base_model": "no/such"}, 400),
        ({"model_path": "not a path"}, 400),
        ({"model_path": "tinker://none:train:0/sampler_weights/none"}, 404),
        ({"base_model": BASE_MODEL, "session_id": "none"}, 404),
    ],
)
def test_a_sampler_of_nothing_is_refused(server: Served, session_id: str, fields: dict[str, Any], status: int) -> None:
    request = {"session_id": session_id, "sampling_session_seq_id": 0, **fields}
    assert post(server.alice, "create_sampling_session", **request).status_code == status


def test_clients_that_join_a_session_get_different_numbers(server: Served, sampler_id: str) -> None:
    joined = [post(server.alice, "join_sampling_session", sampling_session_id=sampler_id).json() for _ in range(2)]
    assert joined == [{"type": "join_sampling_session", "client_counter": number} for number in (1, 2)]
    assert post(server.bob, "join_sampling_session", sampling_session_id=sampler_id).status_code == 404


def test_inflight_weights_are_those_that_were_saved_last(server: Served, run_id: str) -> None:
    def save(seq_id: int) -> str:
        fields = {"model_id": run_id, "seq_id": seq_id, "sampling_session_seq_id": seq_id, "kind": "inflight"}
        saved = result(server.alice, post(server.alice, "save_weights_for_sampler", **fields))
        assert saved["path"] is None
        return str(saved["sampling_session_id"])

    first = save(1)
    post(server.alice, "forward_backward", model_id=run_id, seq_id=2, forward_backward_input=cross_entropy(TOKENS))
    post(server.alice, "optim_step", model_id=run_id, seq_id=3, adam_params={"learning_rate": 0.1})
    samples = [asample(server, first, seq_id=0), asample(server, save(4), seq_id=0), asample(server, first, seq_id=1)]
    before, second, after = [result(server.alice, one)["sequences"][0]["logprobs"] for one in samples]
    assert before != second == after
