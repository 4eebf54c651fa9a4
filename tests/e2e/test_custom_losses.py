"""Losses written with torch, through the official SDK: traced there, checked and run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import count
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
import torch.nn.functional as F
from tinker import types
from tinker.lib.public_interfaces.custom_loss import LossHandle

from tests.conftest import TINY_MODEL, LiveServer

NUMBERS = count(1000)  # that the SDK's own counter does not reach
RANKS: Mapping[str, Any] = {"logprobs": 1, "advantages": 1, "q": 1, "tau": 0}


def loss(
    logprobs: torch.Tensor, advantages: torch.Tensor, q: torch.Tensor, tau: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Truncated importance sampling and a Huber penalty."""
    ratio = (logprobs - q).exp().detach().clamp(max=2.0)
    mask = advantages != 0
    penalty = F.huber_loss(logprobs[mask], q[mask], reduction="sum")
    policy = -(ratio * advantages * logprobs).sum() / logprobs.shape[0]
    return policy + tau * penalty, {"custom/penalty:sum": penalty, "custom/ratio:mean": ratio.mean()}


def second(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logprobs.logsumexp(dim=0), {}


@pytest.fixture(scope="module")
def client(tiny_server: LiveServer) -> tinker.ServiceClient:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        return tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)


@pytest.fixture(scope="module")
def handle(client: tinker.ServiceClient) -> LossHandle:
    created = client.create_custom_loss(loss, RANKS).result()
    assert created.loss_id is not None  # uploaded
    return created


def train_client(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()


def data() -> list[types.Datum]:
    rng = np.random.default_rng(0)
    found = []
    for length in (12, 30, 3):
        tokens = rng.integers(3, 380, length + 1).tolist()
        inputs = {
            "target_tokens": np.array(tokens[1:]),
            "advantages": (rng.normal(size=length) * (np.arange(length) > 1)).astype(np.float32),
            "q": rng.normal(-6, 1, length).astype(np.float32),
            "tau": np.array(0.5, np.float32),
        }
        found.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))  # type: ignore[arg-type]
    return found


@pytest.mark.calls("POST /api/v1/create_custom_loss")
def test_one_pass_on_the_server_is_the_clients_two(client: tinker.ServiceClient, handle: LossHandle) -> None:
    """Same logprobs, loss and metrics, and the same weights after a step."""
    here, there = train_client(client), train_client(client)
    on_server = here.forward_backward_custom(data(), handle).result()
    in_client = there.forward_backward_custom(data(), dataclasses.replace(handle, loss_id=None)).result()
    assert in_client.metrics.pop("surrogate_loss:sum") is not None
    assert on_server.metrics == pytest.approx(in_client.metrics, rel=1e-5)
    assert {"loss:sum", "custom/penalty:sum", "custom/ratio:mean"} == on_server.metrics.keys()
    for ours, theirs in zip(on_server.loss_fn_outputs, in_client.loss_fn_outputs, strict=True):
        assert ours["logprobs"].data == theirs["logprobs"].data
    after = []
    for training in (here, there):
        training.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-6)).result()
        outputs = training.forward(data_for_cross_entropy(), "cross_entropy").result().loss_fn_outputs
        after.append(np.concatenate([out["logprobs"].data for out in outputs]))
    np.testing.assert_allclose(after[0], after[1], atol=1e-4)
    before = np.concatenate([out["logprobs"].data for out in on_server.loss_fn_outputs])
    assert np.abs(after[0] - before).max() > 0.01


def data_for_cross_entropy() -> list[types.Datum]:
    return [
        types.Datum(
            model_input=datum.model_input, loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"]}
        )
        for datum in data()
    ]


def test_a_loss_that_may_not_be_run_is_refused_when_it_is_created(client: tinker.ServiceClient) -> None:
    def fft(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.fft.fft(logprobs).abs().sum(), {}

    with pytest.raises(tinker.RequestFailedError, match=r"fft_fft'; a custom loss may not call this") as caught:
        client.create_custom_loss(fft, {"logprobs": 1}).result()
    assert caught.value.category == types.RequestErrorCategory.User


def test_a_loss_that_fails_names_the_datum_and_the_run_goes_on(client: tinker.ServiceClient) -> None:
    def uneven(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logprobs.reshape(-1, 3).sum(), {}

    created, training = client.create_custom_loss(uneven, {"logprobs": 1}).result(), train_client(client)
    with pytest.raises(tinker.RequestFailedError, match=r"data\[1\]: custom loss 'uneven': node 'reshape'") as caught:
        training.forward_backward_custom([*data()[:1], data_of(10)], created).result()
    assert caught.value.category == types.RequestErrorCategory.User
    assert training.forward_backward_custom(data()[:1], created).result().metrics["loss:sum"] < 0


def data_of(length: int) -> types.Datum:
    tokens = list(range(5, 6 + length))
    targets = {"target_tokens": np.array(tokens[1:])}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=targets)  # type: ignore[arg-type]


def test_a_loss_belongs_to_its_session(handle: LossHandle, tiny_server: LiveServer) -> None:
    other = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    training = train_client(other)
    assert handle.loss_id is not None
    for loss_id in (handle.loss_id, "nobody's"):
        with pytest.raises(tinker.RequestFailedError, match="create_custom_loss created in this session"):
            training.forward_backward(data(), "custom", {"loss_id": loss_id}).result()
    with pytest.raises(tinker.RequestFailedError, match="got 'beta'; custom takes loss_id"):
        training.forward_backward(data(), "custom", {"loss_id": handle.loss_id, "beta": 1.0}).result()
    with pytest.raises(tinker.RequestFailedError, match="loss_fn_config.loss_id: got None"):
        training.forward_backward(data(), "custom").result()


def test_a_retry_gets_the_first_calls_loss(client: tinker.ServiceClient, tiny_server: LiveServer) -> None:
    created = client.create_custom_loss(second, {"logprobs": 1}).result()
    assert created.loss_id is not None
    session_id, _, number = created.loss_id.split(":")
    body = {"session_id": session_id, "custom_loss_seq_id": int(number) + 1, "name": "again", "inputs": []}
    headers = {"X-API-Key": tiny_server.key}
    with httpx.Client(base_url=f"{tiny_server.url}/api/v1", headers=headers) as http:
        request_ids = {
            http.post("/create_custom_loss", json={**body, "graph": {"nodes": []}}).json()["request_id"]
            for _ in range(2)
        }
        assert len(request_ids) == 1
        other = http.post("/create_custom_loss", json={**body, "name": "other", "graph": {"nodes": []}})
    assert other.status_code == 400
    assert "was used by another request" in other.json()["detail"]


def test_a_body_of_nothing_but_brackets_is_refused(tiny_server: LiveServer) -> None:
    body = '{"session_id": "s", "custom_loss_seq_id": 0, "graph": {"nodes": [{"args": ' + "[" * 100_000
    for content, status in ((body, 400), (body + "]" * 100_000 + "}]}}", 400), (body * 11, 413)):
        answer = httpx.post(
            f"{tiny_server.url}/api/v1/create_custom_loss", content=content, headers={"X-API-Key": tiny_server.key}
        )
        assert answer.status_code == status


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": {"format": 2, "nodes": []}}, "graph.format: got 2; must be 1"),
        ({"graph": {"nodes": []}}, "graph.nodes: got 0; must be 1 to 2000 nodes"),
        ({"graph": {"nodes": [{}]}}, "graph.nodes[0].op: got None; must be a text"),
        ({"graph": {}}, "graph.nodes: got None; is required"),
        ({"inputs": [{"name": "logprobs", "rank": "1"}]}, "inputs.0.rank: got '1'"),
        ({"inputs": []}, "inputs: got []; must be logprobs, of rank 1 or 2"),
        ({"name": ""}, "name: got ''"),
    ],
)
def test_a_malformed_graph_fails_through_its_future(
    handle: LossHandle, tiny_server: LiveServer, change: dict[str, Any], message: str
) -> None:
    assert handle.loss_id is not None
    session_id = handle.loss_id.split(":")[0]
    body = {
        "session_id": session_id,
        "custom_loss_seq_id": next(NUMBERS),
        "name": "bad",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"nodes": [{}]},
    }
    headers = {"X-API-Key": tiny_server.key}
    with httpx.Client(base_url=f"{tiny_server.url}/api/v1", headers=headers) as http:
        request_id = http.post("/create_custom_loss", json={**body, **change}).json()["request_id"]
        answer = http.post("/retrieve_future", json={"request_id": request_id}).json()
    assert message in answer["error"]
    assert answer["category"] == "user"
