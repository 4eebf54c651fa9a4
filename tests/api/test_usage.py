from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tinker.types import BillingUsageEvent, BillingUsageResponse, CurrentCheckpointStorageUsageResponse

from tests.api.calls import BASE_MODEL, TOKENS, cross_entropy, post, result
from tests.api.conftest import Served
from tuft.api.usage import _event, _stored
from tuft.metering import GIGABYTE, UsageRow, rate_of
from tuft.records import CheckpointStorage, Tenant, now


def usage(server: Served) -> BillingUsageResponse:
    """Of this hour and the one before it."""
    hour = now().replace(minute=0, second=0, microsecond=0)
    window = {"starting_on": hour - timedelta(hours=1), "ending_before": hour + timedelta(hours=1)}
    query = {field: moment.isoformat() for field, moment in window.items()}
    response = server.alice.get("/api/v1/billing/usage/events", params=query)
    assert response.status_code == 200, response.text
    return BillingUsageResponse.model_validate(response.json())


def test_tokens_and_checkpoints_are_counted_for_the_session_that_used_them(
    server: Served, run_id: str, session_id: str, sampler_id: str
) -> None:
    loss = cross_entropy(TOKENS)
    result(server.alice, post(server.alice, "forward", model_id=run_id, seq_id=1, forward_input=loss))
    trained = post(server.alice, "forward_backward", model_id=run_id, seq_id=2, forward_backward_input=loss)
    result(server.alice, trained)
    result(server.alice, post(server.alice, "save_weights", model_id=run_id, seq_id=3, path="counted"))
    failing = post(server.alice, "forward", model_id=run_id, seq_id=4, forward_input={**loss, "loss_fn": "x"})
    result(server.alice, failing)
    for seq_id in range(2):
        sample = post(
            server.alice,
            "asample",
            sampling_session_id=sampler_id,
            seq_id=seq_id,
            prompt={"chunks": [{"tokens": TOKENS}]},
            num_samples=2,
            sampling_params={"max_tokens": 3, "stop": []},
        )
        result(server.alice, sample)
    answer = usage(server)
    ours = [event for event in answer.data if event.session_id == session_id]
    counted: dict[tuple[str, bool | None], int] = {}
    for event in ours:
        info: Any = event.event_info
        quantity = info.count if info.type == "checkpoint" else info.token_count
        counted[info.type, getattr(info, "cached", None)] = quantity
    prefill = counted.pop(("sampling_prefill", False), 0) + counted.pop(("sampling_prefill", True), 0)
    num_trained = 2 * (len(TOKENS) - 1)
    assert counted == {("training", None): num_trained, ("sampling_sample", None): 12, ("checkpoint", None): 1}
    assert prefill == 2 * len(TOKENS)
    assert {(event.base_model, event.user_id, event.project_id) for event in ours} == {
        (BASE_MODEL, "urn:tuft:tenant:alice", "default")
    }
    assert answer.sessions[session_id].user_metadata == {}
    assert all(event.estimated_cost_usd is None for event in answer.data)


def test_what_is_stored_now_is_told_by_project_and_owner(server: Served, run_id: str, session_id: str) -> None:
    project_id = f"of {session_id}"
    server.alice.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": project_id})
    saved = result(server.alice, post(server.alice, "save_weights", model_id=run_id, seq_id=1, path="kept"))
    listed = server.alice.get(f"/api/v1/training_runs/{run_id}/checkpoints").json()["checkpoints"]
    path = "/api/v1/billing/usage/checkpoints/current"
    answer = server.alice.get(path, params={"project_id": project_id}).json()
    (item,) = CurrentCheckpointStorageUsageResponse.model_validate(answer).data
    assert (item.project_id, item.org_user_urn, item.user_name) == (project_id, "urn:tuft:tenant:alice", "alice")
    (size_bytes,) = [checkpoint["size_bytes"] for checkpoint in listed if checkpoint["tinker_path"] == saved["path"]]
    assert (item.checkpoint_count, item.size_bytes, item.size_gigabytes) == (1, size_bytes, size_bytes / 1e9)
    assert item.estimated_monthly_cost_usd is None
    everything = CurrentCheckpointStorageUsageResponse.model_validate(server.alice.get(path).json()).data
    assert item in everything
    assert server.bob.get(path, params={"project_id": project_id}).json()["data"] == []
    assert server.alice.get(path, params={"project_id": "bobs"}).json()["data"] == []


@pytest.mark.parametrize(
    ("starting_on", "ending_before", "named"),
    [
        ("2026-01-01T00:00:01Z", "2026-01-01T01:00:00Z", "starting_on"),
        ("2026-01-01T00:00:00+00:30", "2026-01-01T01:00:00Z", "starting_on"),
        ("2026-01-01T00:00:00Z", "2026-01-15T01:00:00Z", "ending_before"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "ending_before"),
        ("2999-01-01T00:00:00Z", "2999-01-01T01:00:00Z", "starting_on"),
        ("9999-12-31T23:00:00-05:00", "2026-01-01T01:00:00Z", "starting_on"),
        ("0001-01-01T00:00:00Z", "9999-12-31T23:00:00Z", "ending_before"),
        ("yesterday", "2026-01-01T01:00:00Z", "starting_on"),
    ],
)
def test_a_window_that_cannot_be_answered_is_named(
    server: Served, starting_on: str, ending_before: str, named: str
) -> None:
    query = {"starting_on": starting_on, "ending_before": ending_before}
    response = server.alice.get("/api/v1/billing/usage/events", params=query)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(f"{named}: ")


HOUR = now().replace(minute=0, second=0, microsecond=0)
ALICE = Tenant("tenant-a", "alice")


def test_a_row_tells_the_price_that_it_was_used_at_as_the_sdk_defines_it() -> None:
    trained = UsageRow(HOUR, "s", "m", "training", 3_000_000, "p", {}, rate=rate_of(0.5))
    event = BillingUsageEvent.model_validate(_event(trained, ALICE, True))
    assert (event.estimated_cost_usd, event.effective_rate_usd_per_million_tokens) == (1.5, 0.5)
    assert event.effective_rate_usd_per_gigabyte_month is None
    stored = UsageRow(HOUR, None, "m", "storage", GIGABYTE * 3600 * 72, None, None, rate=rate_of(0.2))
    event = BillingUsageEvent.model_validate(_event(stored, ALICE, True))
    assert event.effective_rate_usd_per_gigabyte_month == 0.2
    assert event.estimated_cost_usd == pytest.approx(0.2 * event.event_info.gigabyte_hours / 720)  # type: ignore[union-attr]
    assert _stored(CheckpointStorage("p", ALICE, 1, 5 * GIGABYTE), 0.2)["estimated_monthly_cost_usd"] == 1.0


def test_what_has_no_price_or_one_in_another_currency_costs_nothing_that_could_be_told_in_dollars() -> None:
    priced = UsageRow(HOUR, "s", "m", "training", 3_000_000, "p", {}, rate=rate_of(0.5))
    free = UsageRow(HOUR, "s", "m", "training", 3_000_000, "p", {})
    for row, has_costs in ((priced, False), (free, True)):
        event = BillingUsageEvent.model_validate(_event(row, ALICE, has_costs))
        assert (event.estimated_cost_usd, event.effective_rate_usd_per_million_tokens) == (None, None)
