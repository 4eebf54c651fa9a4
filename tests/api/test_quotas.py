"""How a quota is refused over HTTP: to everyone, and to an SDK that pauses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.calls import BASE_MODEL, TOKENS, cross_entropy, new_session, post, result
from tests.api.conftest import Served
from tuft.api.quotas import quota_answer
from tuft.errors import CapReached, QuotaExceeded
from tuft.metering import QUOTA_NAMES, Holder
from tuft.store.db import open_database, sqlite_url
from tuft.store.quotas import QuotaTable

SDK = {"User-Agent": "AsyncTinker/Python 0.38.0"}
NUM_TRAINED = len(TOKENS) - 1


@pytest.fixture
def limit(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``limit(tokens_per_day=3)``: of the tenant alice, at once; none any more when the test ends."""
    monkeypatch.setattr("tuft.service.quotas._REFRESH_INTERVAL_S", 0.0)
    tenant = server.services.tenants.named("alice")
    database = open_database(sqlite_url(server.services.config.home))
    table = QuotaTable(database)

    def put(**values: float) -> None:
        table.set(Holder(tenant.tenant_id), values, ())  # type: ignore[arg-type]
        server.services.quotas._refresh_at_s = 0.0  # else within a second

    yield put
    table.set(Holder(tenant.tenant_id), {}, QUOTA_NAMES)
    database.close()
    server.services.quotas._refresh_at_s = 0.0


def train(client: httpx.Client, run_id: str, seq_id: int, headers: dict[str, str] | None = None) -> httpx.Response:
    body = {"model_id": run_id, "seq_id": seq_id, "forward_input": cross_entropy(TOKENS)}
    return client.post("/api/v1/forward", json=body, headers=headers)


def test_a_cap_is_429_with_retry_after_to_everyone_and_402_to_an_sdk_that_pauses_on_it(
    server: Served, run_id: str, limit: Any
) -> None:
    limit(tokens_per_day=0)
    refused = train(server.alice, run_id, 1)
    assert refused.status_code == 429
    assert 0 < int(refused.headers["Retry-After"]) <= 24 * 3600
    detail = refused.json()["detail"]
    assert detail.startswith("tokens_per_day: tenant alice has used")
    assert "the tenant's quota is 0 tokens" in detail
    assert refused.headers["x-deprecation-note"] == f"no deprecation, but a quota: {detail}"
    paused = train(server.alice, run_id, 1, SDK)
    assert (paused.status_code, paused.json()) == (402, refused.json())
    old = train(server.alice, run_id, 1, {"User-Agent": "AsyncTinker/Python 0.16.1"})
    assert old.status_code == 429


def test_what_was_refused_goes_on_with_the_same_seq_once_the_cap_is_lifted(
    server: Served, run_id: str, limit: Any
) -> None:
    limit(tokens_per_day=0)
    assert train(server.alice, run_id, 1, SDK).status_code == 402
    later = train(server.alice, run_id, 2, {})
    assert later.status_code == 429
    limit(tokens_per_day=10**9)
    for seq_id in (2, 1):  # the SDK sends chunks side by side, in any order
        accepted = train(server.alice, run_id, seq_id, SDK)
        assert accepted.status_code == 200, accepted.text
        if seq_id == 1:
            assert "loss_fn_outputs" in result(server.alice, accepted)


def test_too_many_requests_a_second_are_refused_for_a_moment_but_waiting_is_not_counted(
    server: Served, run_id: str, limit: Any
) -> None:
    submitted = train(server.alice, run_id, 1)
    limit(requests_per_s=0.5)
    statuses = [server.alice.get("/api/v1/training_runs").status_code for _ in range(3)]
    assert statuses.count(429) >= 2
    refused = server.alice.get("/api/v1/training_runs")
    assert int(refused.headers["Retry-After"]) <= 2
    for _ in range(3):
        assert "loss_fn_outputs" in result(server.alice, submitted)
    assert server.bob.get("/api/v1/training_runs").status_code == 200


def test_one_run_too_many_is_refused_at_once_and_says_what_makes_room(server: Served, run_id: str, limit: Any) -> None:
    limit(concurrent_runs=1)
    session_id = new_session(server.alice)
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": BASE_MODEL, "lora_config": {"rank": 4}}
    refused = server.alice.post("/api/v1/create_model", json=body)
    assert refused.status_code == 429
    assert refused.headers["x-should-retry"] == "false"
    assert "unload a run, or finish a session, first" in refused.json()["detail"]
    limit(concurrent_runs=10**6, resident_bytes=10_000)
    refused = server.alice.post("/api/v1/create_model", json=body)
    assert refused.status_code == 429
    assert refused.json()["detail"].startswith("resident_bytes: tenant alice has used ")
    limit(resident_bytes=10**12)
    assert server.alice.post("/api/v1/create_model", json=body).status_code == 200
    server.alice.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})


def test_a_save_beyond_the_stored_bytes_is_refused_before_it_and_deleting_makes_room(
    server: Served, run_id: str, limit: Any
) -> None:
    saved = result(server.alice, post(server.alice, "save_weights", model_id=run_id, seq_id=1, path="first"))
    listed = server.alice.get(f"/api/v1/training_runs/{run_id}/checkpoints").json()["checkpoints"]
    (size,) = [item["size_bytes"] for item in listed if item["tinker_path"] == saved["path"]]
    limit(stored_bytes=size * 1.5)
    body = {"model_id": run_id, "seq_id": 2, "path": "second"}
    refused = server.alice.post("/api/v1/save_weights", json=body, headers=SDK)
    assert refused.status_code == 402
    assert refused.json()["detail"].startswith("stored_bytes: tenant alice has used ")
    assert "deleting checkpoints makes room" in refused.json()["detail"]
    limit(stored_bytes=10**12)
    assert result(server.alice, server.alice.post("/api/v1/save_weights", json=body))["path"].endswith("second")


def test_a_moments_wait_is_left_to_the_sdk_and_a_longer_one_is_said() -> None:
    status, headers = quota_answer(QuotaExceeded("requests_per_s: ten", 0.2), SDK["User-Agent"])
    assert (status, headers["Retry-After"], "x-should-retry" in headers) == (429, "1", False)
    status, headers = quota_answer(QuotaExceeded("queued_operations: all", 5.0), SDK["User-Agent"])
    assert (status, headers["Retry-After"], headers["x-should-retry"]) == (429, "5", "false")
    status, headers = quota_answer(CapReached("spend_total: é\nnone", None), "curl/8")
    assert (status, headers["Retry-After"]) == (429, "5")
    assert headers["x-deprecation-note"] == "no deprecation, but a quota: spend_total: ? none"


@pytest.mark.parametrize(("version", "status"), [("0.8.1", 429), ("0.19.9", 429), ("0.20.0", 402), ("1.0.0", 402)])
def test_the_status_of_a_cap_depends_on_whether_the_sdk_pauses(version: str, status: int) -> None:
    assert quota_answer(CapReached("x", 1.0), f"AsyncTinker/Python {version}")[0] == status


def test_the_sdk_is_told_how_long_it_may_pause(server: Served) -> None:
    config = post(server.alice, "client/config", sdk_version="0.38.0").json()
    assert config["billing_exception_max_pause_duration_sec"] == 32 * 86_400
