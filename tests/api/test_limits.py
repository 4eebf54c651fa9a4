"""Every limit of the configuration has a request over it, and its answer gives the number and the option's name.

A new option ``limits.max_...`` fails the first test until it has a case here, or a word on where it is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from tests.api.calls import ALICE, BASE_MODEL, TOKENS, cross_entropy, new_session, post, settled
from tests.api.conftest import Served, serving
from tuft.app import start_engine
from tuft.config import Config, LimitsSection

ROOT = Path(__file__).parents[2]
LIMITS = {
    "max_rank": 8,
    "max_request_bytes": 2**20,
    "max_control_bytes": 2**12,
    "max_data": 2,
    "max_tokens": 12,
    "max_prompt_tokens": 6,
    "max_chunks": 3,
    "max_names": 2,
    "max_num_samples": 4,
    "max_stops": 2,
    "max_stop_bytes": 5,
    "max_topk": 3,
    "max_logprobs": 9,
    "max_name_chars": 20,
    "max_text_chars": 200,
    "max_tags": 2,
    "max_metadata_bytes": 100,
    "max_listed_ids": 3,
    "max_recipients": 2,
    "max_custom_losses": 1,
    "max_loss_nodes": 4,
}
ELSEWHERE = {
    "max_header_bytes": "tests/test_connections.py",
    "max_connections": "tests/test_connections.py",
    "max_inflight_bytes": "tests/api/test_inflight.py",
    "max_runs_per_tenant": "tests/service/test_services.py",
    "max_sessions_per_tenant": "tests/service/test_sessions.py",
    "max_pending_per_tenant": "tests/service/test_futures.py",
    "max_resident_samplers": "tests/service/conftest.py",
}
"""Limits of many requests together: where they are tested."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """A server that allows next to nothing."""
    config = Config(
        home=tmp_path_factory.mktemp("small"),
        server={"long_poll_s": 0.2, "drain_timeout_s": 0.0},
        engine={"device": "cpu", "num_threads": 1, "compiled_kernels": False},
        limits=LIMITS,
        base_models=[{"name": BASE_MODEL, "path": str(tiny_model), "precision": "float32"}],
        keys=[{"tenant": "alice", "key": ALICE}],
    )
    engine = start_engine(config)
    try:
        engine.wait_ready(timeout_s=60)
        with serving(config, engine) as served:
            yield served
    finally:
        engine.close()


class Alice:
    """A client with a session, a run and a sampler; each method returns the text of what the server refused."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.session_id = new_session(client)
        of_session = {"session_id": self.session_id, "base_model": BASE_MODEL}
        made = post(client, "create_model", **of_session, model_seq_id=0, lora_config={"rank": 4})
        self.run_id = settled(client, made.json()["request_id"]).json()["model_id"]
        sampler = post(client, "create_sampling_session", **of_session, sampling_session_seq_id=0)
        self.sampler_id = sampler.json()["sampling_session_id"]
        self.seq_id = self.num_samples = 0
        self.num_losses = 0

    def refused(self, route: str, **fields: Any) -> str:
        return self.answer(post(self.client, route, **fields))

    def answer(self, response: httpx.Response) -> str:
        if response.status_code == 200:
            failed = settled(self.client, response.json()["request_id"]).json()
            return str(failed.get("error", f"not refused: {failed}"))
        assert response.status_code in (400, 413), response.text
        return str(response.json()["detail"])

    def operation(self, route: str, **fields: Any) -> str:
        self.seq_id += 1
        return self.refused(route, model_id=self.run_id, seq_id=self.seq_id, **fields)

    def forward(self, data: list[Any], **more: Any) -> str:
        return self.operation("forward", forward_input={"data": data, "loss_fn": "cross_entropy", **more})

    def sample(self, num_tokens: int = 3, params: dict[str, Any] | None = None, **more: Any) -> str:
        self.num_samples += 1
        fields: dict[str, Any] = {"sampling_session_id": self.sampler_id, "seq_id": self.num_samples, "num_samples": 1}
        fields["prompt"] = {"chunks": [{"tokens": [5] * num_tokens}]}
        return self.refused("asample", **fields, sampling_params={"max_tokens": 1, **(params or {})}, **more)

    def session(self, **fields: Any) -> str:
        return self.refused("create_session", **fields)

    def loss(self, num_nodes: int) -> str:
        self.num_losses += 1
        nodes = [_node("placeholder", "logprobs", "logprobs")]
        nodes += [_node("call_method", f"n{number}", "sum", {"ref": "logprobs"}) for number in range(num_nodes - 2)]
        nodes.append(_node("output", "output", "output", {"tuple": [{"ref": "n0"}, {"dict": {}}]}))
        inputs = [{"name": "logprobs", "rank": 1}]
        fields = {"session_id": self.session_id, "custom_loss_seq_id": self.num_losses, "name": "mine"}
        return self.refused("create_custom_loss", **fields, inputs=inputs, graph={"format": 1, "nodes": nodes})


def _node(op: str, name: str, target: str, *args: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


def datum(tokens: list[int] = TOKENS, **more: Any) -> dict[str, Any]:
    (found,) = cross_entropy(tokens)["data"]
    return {**found, **more}


def chunks(num_chunks: int) -> dict[str, Any]:
    return {"chunks": [{"tokens": [5]}] * num_chunks}


def second_loss(alice: Alice) -> str:
    alice.loss(3)
    return alice.loss(3)


def bomb(alice: Alice) -> str:
    content = zstandard.ZstdCompressor().compress(b" " * 2**21)
    headers = {"Content-Encoding": "zstd"}
    return alice.answer(alice.client.post("/api/v1/asample", content=content, headers=headers))


CASES: dict[str, list[Callable[[Alice], str]]] = {
    "max_rank": [
        lambda alice: alice.refused(
            "create_model",
            session_id=alice.session_id,
            model_seq_id=1,
            base_model=BASE_MODEL,
            lora_config={"rank": 9},
        )
    ],
    "max_request_bytes": [lambda alice: alice.sample(more="x" * 2**20), bomb],
    "max_control_bytes": [lambda alice: alice.session(more="x" * 2**12)],
    "max_data": [lambda alice: alice.forward([datum([1, 2])] * 3)],
    "max_tokens": [lambda alice: alice.forward([datum([5] * 8)] * 2)],
    "max_prompt_tokens": [lambda alice: alice.sample(num_tokens=7)],
    "max_chunks": [
        lambda alice: alice.forward([datum(model_input=chunks(4))]),
        lambda alice: alice.refused(
            "asample", sampling_session_id=alice.sampler_id, seq_id=0, prompt=chunks(4), num_samples=1
        ),
    ],
    "max_names": [
        lambda alice: alice.forward([datum(loss_fn_inputs={key: {"data": []} for key in "abc"})]),
        lambda alice: alice.forward([datum()], loss_fn_config=dict.fromkeys("abc", 1.0)),
    ],
    "max_num_samples": [lambda alice: alice.refused("asample", **many_samples(alice))],
    "max_stops": [lambda alice: alice.sample(params={"stop": ["a", "b", "c"]})],
    "max_stop_bytes": [lambda alice: alice.sample(params={"stop": "ééé"})],
    "max_topk": [
        lambda alice: alice.sample(topk_prompt_logprobs=4),
        lambda alice: alice.sample(topk_sample_logprobs=4),
        lambda alice: alice.sample(prompt_alt_tokens_k=4),
    ],
    "max_logprobs": [lambda alice: alice.sample(num_tokens=5, topk_prompt_logprobs=2)],
    "max_name_chars": [
        lambda alice: alice.operation("save_weights", path="n" * 21),
        lambda alice: alice.operation("save_weights_for_sampler", path="n" * 21),
        lambda alice: alice.operation("save_weights_external", path="n" * 21),
        lambda alice: alice.session(project_id="n" * 21),
    ],
    "max_text_chars": [
        lambda alice: alice.session(display_name="n" * 201),
        lambda alice: alice.session(tags=["n" * 201]),
        lambda alice: alice.refused("session_heartbeat", session_id="n" * 201),
        lambda alice: alice.refused("weights_info", tinker_path="n" * 201),
    ],
    "max_tags": [lambda alice: alice.session(tags=["a", "b", "c"])],
    "max_metadata_bytes": [lambda alice: alice.session(user_metadata={"a": "b" * 100})],
    "max_listed_ids": [
        lambda alice: alice.refused(
            "retrieve_futures",
            target={"sampling_session_id": alice.sampler_id},
            timeout=0.0,
            retrieved_request_ids=["a"] * 4,
        )
    ],
    "max_recipients": [
        lambda alice: alice.operation("save_weights_external", path="x", age_encryption_recipients=["a"] * 3)
    ],
    "max_custom_losses": [second_loss],
    "max_loss_nodes": [lambda alice: alice.loss(5)],
}


def many_samples(alice: Alice) -> dict[str, Any]:
    return {"sampling_session_id": alice.sampler_id, "seq_id": 10**6, "prompt": chunks(2), "num_samples": 5}


@pytest.fixture(scope="module")
def alice(small: Served) -> Alice:
    return Alice(small.alice)


def test_every_limit_of_a_request_has_a_case() -> None:
    limits = {name for name in LimitsSection.model_fields if name.startswith("max_")}
    assert limits == {*CASES, *ELSEWHERE}
    for name, file in ELSEWHERE.items():
        assert name in (ROOT / file).read_text(), f"{file} does not test {name}"


@pytest.mark.parametrize(
    ("limit", "case"),
    [(limit, case) for limit, cases in CASES.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "case",
)
def test_what_is_over_a_limit_is_refused_with_its_number(
    alice: Alice, limit: str, case: Callable[[Alice], str]
) -> None:
    refused = case(alice)
    assert f"limits.{limit}" in refused
    assert str(LIMITS[limit]) in refused


def test_what_is_within_all_limits_is_done(alice: Alice) -> None:
    alice.seq_id += 1
    data = {"data": [datum(TOKENS)], "loss_fn": "cross_entropy"}
    made = post(alice.client, "forward", model_id=alice.run_id, seq_id=alice.seq_id, forward_input=data)
    assert "metrics" in settled(alice.client, made.json()["request_id"]).json()


def test_a_text_that_was_cut_may_be_longer(alice: Alice) -> None:
    """The traceback of a client that fails."""
    session_id = new_session(alice.client)
    reason = {"type": "errored"}
    content = json.dumps({"reason": reason, "detail": "x" * 300})
    response = alice.client.post(f"/api/v1/sessions/{session_id}/finish", content=content)
    assert response.status_code == 200
