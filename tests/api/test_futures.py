"""What a client sees of a future before it is settled, after, and when there is none."""

from __future__ import annotations

from tests.api.calls import TOKENS, cross_entropy, post, result, settled
from tests.api.conftest import Served


def test_a_pending_future_is_408_with_its_queue_state(server: Served, run_id: str) -> None:
    waiting = post(server.alice, "optim_step", model_id=run_id, seq_id=2, adam_params={}).json()["request_id"]
    response = post(server.alice, "retrieve_future", request_id=waiting)
    assert response.status_code == 408
    assert response.json() == {
        "type": "try_again",
        "request_id": waiting,
        "queue_state": "active",
        "queue_state_reason": None,
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
