"""What a client sees of a future before it is settled, after, and when there is none."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from tinker.types.future_completion import FutureFailed, FutureFinished
from tinker.types.futures_retrieve_response import FuturesRetrieveResponse

from tests.api.calls import TOKENS, cross_entropy, post, result, settled
from tests.api.conftest import Served
from tuft.api import results
from tuft.service.settlements import size_bytes
from tuft.types import Matrix, SampledSequence, SampleResult, TokenLogprobs


def test_a_pending_future_is_408_with_its_queue_state(server: Served, run_id: str) -> None:
    waiting = post(server.alice, "optim_step", model_id=run_id, seq_id=2, adam_params={}).json()["request_id"]
    response = post(server.alice, "retrieve_future", request_id=waiting)
    assert response.status_code == 408
    assert response.json() == {
        "type": "try_again",
        "request_id": waiting,
        "queue_state": "active",
        "queue_state_reason": "waits for seq_id 1 of its run, which has not come",
    }
    post(server.alice, "optim_step", model_id=run_id, seq_id=1, adam_params={})
    assert settled(server.alice, waiting).status_code == 200


def test_a_result_can_be_read_again(server: Served, run_id: str) -> None:
    submitted = post(server.alice, "forward", model_id=run_id, seq_id=1, forward_input=cross_entropy(TOKENS))
    assert result(server.alice, submitted) == result(server.alice, submitted)


def test_a_failure_is_a_result_with_a_category(server: Served, run_id: str) -> None:
    payload = cross_entropy(TOKENS, loss_fn="no_such_loss")
    failed = result(server.alice, post(server.alice, "forward", model_id=run_id, seq_id=1, forward_input=payload))
    assert set(failed) == {"error", "category"}
    assert failed["category"] == "user"


def test_an_unknown_future_is_gone(server: Served) -> None:
    response = post(server.alice, "retrieve_future", request_id="future-0")
    assert response.status_code == 410
    assert "future-0" in response.json()["detail"]


def test_only_losses_and_samples_come_in_protobuf(server: Served, run_id: str) -> None:
    step = post(server.alice, "optim_step", model_id=run_id, seq_id=1, adam_params={})
    response = settled(server.alice, step.json()["request_id"], Accept="application/x-protobuf")
    assert response.headers["content-type"] == "application/json"
    assert "metrics" in response.json()


def wide() -> TokenLogprobs:
    return TokenLogprobs(np.zeros((50, 200), np.int64), np.zeros((50, 200), np.float32))


@pytest.mark.parametrize(
    "parts",
    [
        {"prompt_logprobs_P": np.zeros(10_000, np.float32)},
        {"topk_prompt": wide()},
        {"prompt_alternatives": wide()},
        {"target_prompt_logprobs": Matrix(np.zeros(10_000, np.float32), (50, 200))},
        {"sequences": (SampledSequence(np.zeros(50, np.int64), np.zeros(50, np.float32), "stop", wide()),)},
    ],
)
def test_every_part_of_a_sample_counts_when_its_size_is_told(parts: dict[str, Any]) -> None:
    sample = SampleResult(**{"sequences": (), **parts})
    size = size_bytes(sample)
    encoded = len(results.encode_proto(sample))
    assert 0.99 * encoded < size < 1.6 * encoded  # ids take 4 bytes on the wire and 8 here


# --- many at once -----------------------------------------------------------------------------------------------------


def sample(server: Served, sampler_id: str, seq_id: int = 0, max_tokens: int = 2) -> str:
    prompt = {"chunks": [{"tokens": TOKENS}]}
    params = {"max_tokens": max_tokens, "stop": []}
    fields = {"sampling_session_id": sampler_id, "seq_id": seq_id, "prompt": prompt, "sampling_params": params}
    return str(post(server.alice, "asample", **fields).json()["request_id"])


def poll(client: httpx.Client, sampler_id: str, clone: int = 0, **more: Any) -> httpx.Response:
    target = {"type": "sampling_session", "sampling_session_id": sampler_id, "cloned_sampler_id": clone}
    return post(client, "retrieve_futures", target=target, **more)


def first_told(client: httpx.Client, sampler_id: str, clone: int = 0) -> FuturesRetrieveResponse:
    """Poll as the SDK does, until something has ended."""
    while True:
        told = FuturesRetrieveResponse.model_validate(poll(client, sampler_id, clone).json())
        if told.completions:
            return told


def test_a_poll_tells_which_samples_of_a_client_have_ended(server: Served, sampler_id: str) -> None:
    request_id, clones = sample(server, sampler_id), sample(server, sampler_id, 3 * 10**9)
    told = first_told(server.alice, sampler_id)
    (finished,) = told.completions
    assert finished.request_id == request_id
    assert isinstance(finished, FutureFinished)
    assert finished.response_payload_uncompressed_size == 2 * (8 + 4)
    assert [one.request_id for one in first_told(server.alice, sampler_id, 3).completions] == [clones]
    assert poll(server.alice, sampler_id, prev_cursor=told.cursor, timeout=0).json() == {
        "completions": [],
        "cursor": told.cursor,
    }


def test_a_sample_that_failed_is_told_of_and_says_why(server: Served, sampler_id: str) -> None:
    request_id = sample(server, sampler_id, max_tokens=500)
    assert post(server.alice, "cancel_future", request_id=request_id).json() == {}
    assert first_told(server.alice, sampler_id).completions == [FutureFailed(request_id=request_id)]
    assert settled(server.alice, request_id).json() == {
        "error": "cancelled: its client asked for that",
        "category": "user",
    }
    assert post(server.alice, "cancel_future", request_id=request_id).status_code == 200


def test_a_result_is_kept_until_its_client_has_it(server: Served, sampler_id: str) -> None:
    request_id = sample(server, sampler_id)
    first = settled(server.alice, request_id)
    assert settled(server.alice, request_id).content == first.content
    assert poll(server.alice, sampler_id, 1, timeout=0, retrieved_request_ids=[request_id]).status_code == 200
    assert settled(server.alice, request_id).content == first.content  # another client cannot free it
    assert poll(server.alice, sampler_id, timeout=0, retrieved_request_ids=[request_id]).json()["completions"] == []
    assert settled(server.alice, request_id).content == first.content  # for a while: answers can be lost


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "target: got None; is required"),
        ({"target": {"sampling_session_id": "s", "type": "run"}}, "target.type: got 'run'; must be 'sampling_session'"),
        ({"target": {"sampling_session_id": "s"}, "timeout": -1}, "timeout: got -1"),
        ({"target": {"sampling_session_id": "s"}, "prev_cursor": "x"}, "prev_cursor: got 'x'; must be a valid integer"),
    ],
)
def test_a_wrong_poll_is_refused(server: Served, fields: dict[str, Any], complaint: str) -> None:
    response = post(server.alice, "retrieve_futures", **fields)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(complaint)


def test_nothing_of_anothers_is_told_freed_or_cancelled(server: Served, sampler_id: str, run_id: str) -> None:
    request_id = sample(server, sampler_id)
    assert poll(server.bob, sampler_id, retrieved_request_ids=[request_id]).status_code == 404
    assert post(server.bob, "cancel_future", request_id=request_id).status_code == 410
    assert settled(server.alice, request_id).status_code == 200
    parked = post(server.alice, "optim_step", model_id=run_id, seq_id=2, adam_params={}).json()["request_id"]
    refused = post(server.alice, "cancel_future", request_id=parked)
    assert refused.status_code == 400
    assert "only samples can be cancelled" in refused.json()["detail"]
