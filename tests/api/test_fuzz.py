"""Whatever JSON a client sends, the server neither stumbles (5xx) nor loses its run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.calls import BASE_MODEL, TOKENS, cross_entropy, post, result
from tests.api.conftest import Served

SAMPLE = {
    "sampling_session_id": "SAMPLER",
    "seq_id": 0,
    "prompt": {"chunks": [{"tokens": TOKENS}]},
    "sampling_params": {"max_tokens": 1, "seed": 1, "stop": ["x"], "temperature": 1.0, "top_k": -1, "top_p": 1.0},
    "num_samples": 1,
    "prompt_logprobs": True,
    "topk_prompt_logprobs": 0,
    "topk_sample_logprobs": 1,
    "target_prompt_logprobs": {"data": [1] * 4, "dtype": "int64", "shape": [4, 1], "sparse_crow_indices": None},
    "prompt_alt_tokens_k": 1,
    "prompt_logprobs_last_n": 2,
    "record_stability_info": False,
}
CREATE = {
    "session_id": "SESSION",
    "model_seq_id": 1_000_000,
    "base_model": BASE_MODEL,
    "lora_config": {"rank": 1, "seed": 1, "train_mlp": True},
    "user_metadata": {"a": "b"},
}
OPERATION = {"model_id": "RUN", "seq_id": 1}
REQUESTS: dict[str, dict[str, Any]] = {
    "create_session": {"tags": ["a"], "user_metadata": {}, "sdk_version": "1", "display_name": "d", "project_id": "p"},
    "sessions/search": {
        "session_id": "SESSION",
        "project_ids": ["p"],
        "user_metadata": {"a": "b"},
        "display_name": "d",
        "owner": {"type": "user", "owner_urns": ["urn:tuft:tenant:alice"]},
        "statuses": [{"type": "client_finished", "reasons": ["success"]}],
        "limit": 50,
        "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "SESSION"},
    },
    "session_heartbeat": {"session_id": "SESSION"},
    "sessions/SESSION/finish": {"reason": {"type": "x"}, "detail": "d"},
    "create_model": CREATE,
    "get_info": {"model_id": "RUN"},
    "forward": {**OPERATION, "forward_input": cross_entropy(TOKENS, loss_fn_config={"a": 1})},
    "optim_step": {**OPERATION, "adam_params": {"learning_rate": 0.1, "beta1": 0.5}},
    "save_weights": {**OPERATION, "path": "p", "ttl_seconds": 3600, "user_metadata": {"a": "b"}},
    "save_weights_for_sampler": {**OPERATION, "sampling_session_seq_id": 7, "path": None, "ttl_seconds": None},
    "save_weights_external": {**OPERATION, "path": "p", "ttl_seconds": 3600, "age_encryption_recipients": ["age1"]},
    "copy_weights": {
        "source_path": "tinker://a/weights/b",
        "session_id": "SESSION",
        "model_seq_id": 5,
        "destination_project_id": None,
        "ttl_seconds": 3600,
        "weights_access_token": "tml-x",
    },
    "load_weights": {**OPERATION, "path": "tinker://a/weights/b", "optimizer": True},
    "create_sampling_session": {"session_id": "SESSION", "sampling_session_seq_id": 3, "base_model": BASE_MODEL},
    "asample": SAMPLE,
    "retrieve_future": {"request_id": "future-1"},
    "weights_info": {"tinker_path": "tinker://a/weights/b"},
}

LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, -(2**70), 1e300, 0.5])
    | st.text(max_size=4)
    | st.sampled_from(["\x00", "é" * 3, "../..", "tinker://", "SESSION"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    return value_at(value[path[0]], path[1:]) if path else value


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


def filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


class Caller:
    """Alice, who sends each operation under her run's next seq, as the SDK does."""

    def __init__(self, server: Served, **names: str) -> None:
        self.server = server
        self.names = names
        self.next_seq = {names["RUN"]: 1, names["SAMPLER"]: 0}

    def send(self, route: str, place: tuple[Any, ...], value: Any) -> None:
        """Send ``route``'s request with ``value`` at ``place``; an outcome comes and is never the server's fault."""
        counter = self.names["SAMPLER" if route == "asample" else "RUN"]
        request = {**REQUESTS[route], "seq_id": self.next_seq[counter]}
        if "sampling_session_seq_id" in request:
            request["sampling_session_seq_id"] = 1000 + self.next_seq[counter]
        body = filled(replaced(request, place, value), self.names)
        response = self.server.alice.post(f"/api/v1/{route.replace('SESSION', self.names['SESSION'])}", json=body)
        assert response.status_code < 500, f"{value}: {response.text}"
        if response.status_code >= 400:
            assert response.json().get("detail") or response.status_code == 408
        elif "request_id" in response.json() and place[:1] != ("seq_id",):
            outcome = result(self.server.alice, response)
            assert outcome.get("category") != "server", f"{value}: {outcome}"
            self.next_seq[counter] += route != "create_model"


@pytest.fixture
def caller(server: Served, session_id: str, run_id: str, sampler_id: str) -> Caller:
    return Caller(server, SESSION=session_id, RUN=run_id, SAMPLER=sampler_id)


@pytest.mark.parametrize("route", sorted(REQUESTS))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_json_makes_the_server_stumble(caller: Caller, route: str, data: st.DataObject) -> None:
    caller.send(route, data.draw(st.sampled_from(places(REQUESTS[route]))), data.draw(VALUES))


NUMBERS = [
    (route, place)
    for route, request in sorted(REQUESTS.items())
    for place in places(request)
    if type(value_at(request, place)) in (int, float)
]
EXTREMES = [0, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**70), 1e308, 1e-30, 1e-320]


@pytest.mark.parametrize(("route", "place"), NUMBERS, ids=str)
def test_no_number_is_too_large_or_too_small(caller: Caller, route: str, place: tuple[Any, ...]) -> None:
    for extreme in EXTREMES:
        caller.send(route, place, extreme)


def test_a_run_survives_what_was_refused(server: Served, run_id: str) -> None:
    for seq_id in (1, 2):
        post(server.alice, "optim_step", model_id=run_id, seq_id=seq_id, adam_params={"beta1": [seq_id]})
    done = post(server.alice, "forward", model_id=run_id, seq_id=3, forward_input=cross_entropy(TOKENS))
    assert "metrics" in result(server.alice, done)
