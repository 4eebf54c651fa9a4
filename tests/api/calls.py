"""Calls to a running server, as the SDK makes them."""

from __future__ import annotations

from typing import Any

import httpx
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto

PROTOBUF = {"Content-Type": "application/x-protobuf"}
BASE_MODEL = "tests/tiny-qwen3"
ALIAS = "tiny-qwen3"
ALICE, BOB = "tml-alice", "tml-bob"
SHARED_PROJECT = "alice-and-bob"
LIMIT_BYTES = 2**20
TOKENS = [10, 20, 30, 40, 50]


def post(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    return client.post(f"/api/v1/{route}", json=fields)


def settled(client: httpx.Client, request_id: str, **headers: str) -> httpx.Response:
    """Poll as the SDK does, until the future is settled."""
    while True:
        response = client.post("/api/v1/retrieve_future", json={"request_id": request_id}, headers=headers)
        if response.status_code != 408:
            return response


def result(client: httpx.Client, submitted: httpx.Response) -> dict[str, Any]:
    assert submitted.status_code == 200, submitted.text
    response = settled(client, submitted.json()["request_id"])
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def new_session(client: httpx.Client) -> str:
    return str(post(client, "create_session", tags=[], sdk_version="0").json()["session_id"])


def cross_entropy(tokens: list[int], **more: Any) -> dict[str, Any]:
    """A forward_backward payload as old SDKs send it: each token is to predict the next."""
    inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [len(tokens) - 1]}}
    datum = {"model_input": {"chunks": [{"tokens": tokens[:-1]}]}, "loss_fn_inputs": inputs}
    return {"data": [datum], "loss_fn": "cross_entropy", **more}


def datum(tokens: list[int], **more: Any) -> tinker.Datum:
    """The same as the newest SDK has it."""
    inputs = {"target_tokens": tokens[1:], **more}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def proto_body(run_id: str, seq_id: int, data: list[tinker.Datum], *, forward_only: bool = False) -> bytes:
    """A forward_backward body as the newest SDK sends it."""
    loss_input = tinker.types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")
    request = tinker.types.ForwardBackwardRequest(forward_backward_input=loss_input, model_id=run_id, seq_id=seq_id)
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    return bytes(message.SerializeToString())


def post_proto(client: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    return client.post("/api/v1/forward_backward", content=body, headers={**PROTOBUF, **headers})
