"""Runs and their loop over HTTP: a real tiny model, both wire formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fastapi import Request
from tinker.proto.response_conv import deserialize_forward_backward_output

from tests.api.calls import (
    ALIAS,
    BASE_MODEL,
    PROTOBUF,
    TOKENS,
    cross_entropy,
    datum,
    post,
    post_proto,
    proto_body,
    result,
    settled,
)
from tests.api.conftest import Served
from tuft.api.training import is_loopback

ACCEPT_PROTOBUF = {"Accept": "application/x-protobuf, application/json"}


def test_a_run_is_named_as_the_sdk_composes_it(server: Served, session_id: str, run_id: str) -> None:
    assert run_id == f"{session_id}:train:0"


def test_get_info_says_what_the_sdk_needs(server: Served, run_id: str) -> None:
    info = post(server.alice, "get_info", model_id=run_id).json()
    folder = info["model_data"].pop("tokenizer_id")
    assert info == {
        "type": "get_info",
        "model_id": run_id,
        "model_name": BASE_MODEL,
        "model_data": {"arch": "Qwen3ForCausalLM", "model_name": BASE_MODEL},
        "is_lora": True,
        "lora_rank": 4,
        "optimizer_config": {"type": "adamw"},
    }
    assert folder == server.services.base_models[0].tokenizer_dir  # this client is on the same machine


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("testclient", False),
        (None, False),
    ],
)
def test_only_a_client_on_this_machine_is_given_a_folder_of_it(host: str | None, here: bool) -> None:
    client = None if host is None else (host, 1)
    assert is_loopback(Request({"type": "http", "client": client})) is here


def test_the_wire_formats_give_the_same_numbers(server: Served, run_id: str) -> None:
    in_json = post(server.alice, "forward", model_id=run_id, seq_id=1, forward_input=cross_entropy(TOKENS))
    in_proto = post_proto(server.alice, proto_body(run_id, 2, [datum(TOKENS)], forward_only=True))
    old = result(server.alice, in_json)
    response = settled(server.alice, in_proto.json()["request_id"], **ACCEPT_PROTOBUF)
    assert response.headers["content-type"] == PROTOBUF["Content-Type"]
    new = deserialize_forward_backward_output(response.content)
    assert old["metrics"] == new.metrics
    assert old["loss_fn_output_type"] == new.loss_fn_output_type == "ArrayRecord"
    (old_output,), (new_output,) = old["loss_fn_outputs"], new.loss_fn_outputs
    logprobs = new_output["logprobs"].to_numpy()
    assert logprobs.shape == (len(TOKENS) - 1,)
    np.testing.assert_array_equal(np.array(old_output["logprobs"]["data"], dtype=np.float32), logprobs)
    assert old["metrics"]["loss:sum"] == pytest.approx(-logprobs.sum(), rel=1e-5)


def test_the_loop_learns_and_forward_alone_does_not(server: Served, run_id: str) -> None:
    losses = []
    for seq_id in (1, 3, 5):
        forward_only = seq_id == 3
        body = proto_body(run_id, seq_id, [datum(TOKENS)], forward_only=forward_only)
        losses.append(result(server.alice, post_proto(server.alice, body))["metrics"]["loss:sum"])
        step = post(server.alice, "optim_step", model_id=run_id, seq_id=seq_id + 1, adam_params={"learning_rate": 0.05})
        assert set(result(server.alice, step)) == {"type", "metrics"}
    first, after_a_step, after_an_empty_step = losses
    assert after_a_step < first
    assert np.isfinite(after_an_empty_step)


def test_operations_that_arrive_out_of_order_run_in_order(server: Served, run_id: str) -> None:
    late = [post_proto(server.alice, proto_body(run_id, seq_id, [datum(TOKENS)])) for seq_id in (2, 3)]
    step = post(server.alice, "optim_step", model_id=run_id, seq_id=4, adam_params={})
    first_id = late[0].json()["request_id"]
    assert post(server.alice, "retrieve_future", request_id=first_id).status_code == 408
    first = post_proto(server.alice, proto_body(run_id, 1, [datum(TOKENS)]))
    for submitted in (first, *late, step):
        assert "metrics" in result(server.alice, submitted)


def test_a_retry_of_a_seq_gets_the_same_future(server: Served, run_id: str) -> None:
    body = proto_body(run_id, 1, [datum(TOKENS)])
    first, second = (post_proto(server.alice, body).json() for _ in range(2))
    assert first == second
    assert first["model_id"] == run_id


DIMUON = {"type": "dimuon", "learning_rate": 0.1}
WRONG_PAYLOADS = [
    ("optim_step", {"adam_params": {"beta1": "fast"}}, "adam_params.beta1: got 'fast'"),
    ("optim_step", {"adam_params": {"beta1": 1.5}}, "adam_params.beta1: got 1.5"),
    ("optim_step", {}, "adam_params: got None; is required"),
    ("optim_step", {"optimizer_params": DIMUON}, "optimizer_params: got 'dimuon'; the run's optimizer is 'adamw'"),
    ("optim_step", {"optimizer_params": {"type": "sgd"}}, "optimizer_params.type: got 'sgd'; must be 'adamw' or 'dim"),
    ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "optimizer_params.learning_rate: got None; is required"),
    ("optim_step", {"optimizer_params": {}}, "optimizer_params.type: got None; is required"),
    ("optim_step", {"adam_params": {}, "optimizer_params": DIMUON}, "optimizer_params: got 'dimuon'; must be absent"),
    ("save_weights", {"path": 3}, "path: got 3; must be a valid string"),
    ("save_weights", {"path": "a/b"}, "path: got 'a/b'"),
    ("save_weights", {"path": "a", "ttl_seconds": 1}, "ttl_seconds: got 1"),
    ("save_weights_for_sampler", {"path": None, "kind": "live", "sampling_session_seq_id": 1}, "kind: got 'live'"),
    ("save_weights_for_sampler", {}, "sampling_session_seq_id: got None"),
    ("load_weights", {"optimizer": True}, "path: got None; is required"),
    ("load_weights", {"path": "x", "optimizer": True}, "path: got 'x'"),
    ("load_weights", {"path": "x", "optimizer_config": {"type": "dimuon"}}, "optimizer_config.type: got 'dimuon'"),
    ("load_weights", {"path": "tinker://a/weights/b", "weights_access_token": "tml-x"}, "weights_access_token: got"),
    ("save_weights_external", {}, "path: got None; is required"),
    ("save_weights_external", {"path": "../x"}, "path: got '../x'; must be 1 to 128"),
    ("save_weights_external", {"path": "x", "ttl_seconds": 1}, "ttl_seconds: got 1; must be 3600 to"),
    ("forward", {}, "forward_input: got None; must be an object"),
    ("forward_backward", {"forward_backward_input": {"data": []}}, "forward_backward_input.loss_fn: got None"),
    ("forward_backward", {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}, "data: got []"),
    ("forward_backward", {"forward_backward_input": cross_entropy([1, 2], loss_fn="dpo")}, "loss_fn: got 'dpo'"),
    ("forward_backward", {"forward_backward_input": cross_entropy([1, 9999])}, "data[0].loss_fn_inputs.target_tokens"),
]


@pytest.mark.parametrize(("route", "payload", "complaint"), WRONG_PAYLOADS)
def test_a_wrong_payload_fails_through_its_future_and_consumes_its_seq(
    server: Served, run_id: str, route: str, payload: dict[str, Any], complaint: str
) -> None:
    wrong = post(server.alice, route, model_id=run_id, seq_id=1, **payload)
    right = post(server.alice, "optim_step", model_id=run_id, seq_id=2, adam_params={})
    failed = result(server.alice, wrong)
    assert failed["category"] == "user"
    assert failed["error"].startswith(complaint)
    assert "metrics" in result(server.alice, right)


def test_a_truncated_protobuf_consumes_its_seq_too(server: Served, run_id: str) -> None:
    body = proto_body(run_id, 1, [datum(TOKENS)])
    wrong = post_proto(server.alice, body[:-5])
    right = post_proto(server.alice, proto_body(run_id, 2, [datum(TOKENS)]))
    assert result(server.alice, wrong) == {
        "error": f"body: got '{len(body) - 5} bytes'; must be a ForwardBackwardRequest in protobuf",
        "category": "user",
    }
    assert "metrics" in result(server.alice, right)


def test_a_protobuf_without_an_envelope_is_refused_at_once(server: Served) -> None:
    response = post_proto(server.alice, b"\xff\xff\xff")
    assert response.status_code == 400
    assert "model_id and seq_id" in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"base_model": "no/such"}, "base_model: got 'no/such'; this server has"),
        ({"lora_config": {"rank": 0}}, "lora_config.rank: got 0; must be 1 to 256"),
        ({"lora_config": {"rank": "8"}}, "lora_config.rank: got '8'; must be a valid integer"),
        ({"model_seq_id": None}, "model_seq_id: got None; must be a valid integer"),
        ({"optimizer_config": {"type": "sgd"}}, "optimizer_config.type: got 'sgd'; must be 'adamw' or 'dimuon'"),
        ({"optimizer_config": {"type": "dimuon", "version": 2}}, "optimizer_config.version: got 2; must be 1"),
    ],
)
def test_a_run_that_cannot_be_is_refused_at_once(
    server: Served, session_id: str, fields: dict[str, Any], complaint: str
) -> None:
    request = {"session_id": session_id, "model_seq_id": 0, "base_model": BASE_MODEL, **fields}
    response = post(server.alice, "create_model", **request)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(complaint)


@pytest.mark.parametrize("name", [ALIAS, f"{BASE_MODEL}:peft:262144", f"{ALIAS}:peft:1024"])
def test_an_alias_and_a_name_with_a_suffix_are_the_same_base_model(server: Served, session_id: str, name: str) -> None:
    created = post(server.alice, "create_model", session_id=session_id, model_seq_id=9, base_model=name)
    run_id = result(server.alice, created)["model_id"]
    assert post(server.alice, "get_info", model_id=run_id).json()["model_name"] == BASE_MODEL


def test_a_run_created_from_a_checkpoint_continues_it(server: Served, session_id: str, run_id: str) -> None:
    result(server.alice, post_proto(server.alice, proto_body(run_id, 1, [datum(TOKENS)])))
    step = post(server.alice, "optim_step", model_id=run_id, seq_id=2, adam_params={"learning_rate": 0.05})
    result(server.alice, step)
    saved = result(server.alice, post(server.alice, "save_weights", model_id=run_id, seq_id=3, path="first"))
    assert saved == {"type": "save_weights", "path": f"tinker://{run_id}/weights/first"}
    expected = result(server.alice, post_proto(server.alice, proto_body(run_id, 4, [datum(TOKENS)])))

    created = post(
        server.alice, "load_weights", session_id=session_id, model_seq_id=1, path=saved["path"], optimizer=True
    )
    other_id = f"{session_id}:train:1"
    assert result(server.alice, created) == {"type": "load_weights", "path": saved["path"], "model_id": other_id}
    got = result(server.alice, post_proto(server.alice, proto_body(other_id, 1, [datum(TOKENS)])))
    assert got["metrics"] == expected["metrics"]

    for seq, optimizer in enumerate(({"optimizer": True}, {"optimizer": False}, {}), 5):
        back = post(server.alice, "load_weights", model_id=run_id, seq_id=seq, path=saved["path"], **optimizer)
        assert result(server.alice, back)["model_id"] == run_id


@pytest.mark.calls("POST /api/v1/unload_model")
def test_an_unloaded_run_takes_no_more_operations(server: Served, run_id: str) -> None:
    unloaded = post(server.alice, "unload_model", model_id=run_id)
    assert result(server.alice, unloaded) == {"type": "unload_model", "model_id": run_id}
    failed = result(server.alice, post(server.alice, "optim_step", model_id=run_id, seq_id=1, adam_params={}))
    assert failed["category"] == "user"
    assert "unloaded" in failed["error"]
