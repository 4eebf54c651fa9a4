from __future__ import annotations

from typing import Any

import pytest
from tinker.types import AuditLogResponse

from tests.api.calls import SHARED_PROJECT, post, result
from tests.api.conftest import Served


def entries(client: Any, **query: Any) -> list[dict[str, Any]]:
    response = client.get("/api/v1/audit", params=query)
    assert response.status_code == 200, response.text
    AuditLogResponse.model_validate(response.json())
    found: list[dict[str, Any]] = response.json()["entries"]
    return found


def test_what_was_done_with_a_checkpoint_is_in_the_log(server: Served, run_id: str) -> None:
    saved = result(server.alice, post(server.alice, "save_weights", model_id=run_id, seq_id=1, path="c"))
    load = post(server.alice, "load_weights", model_id=run_id, seq_id=2, path=saved["path"], optimizer=True)
    result(server.alice, load)
    server.alice.delete(f"/api/v1/training_runs/{run_id}/checkpoints/weights/c")
    noted = [entry for entry in entries(server.alice, event_type="checkpoints") if entry["model_id"] == run_id]
    assert [entry["event"] for entry in noted] == ["checkpoint_save", "checkpoint_read", "checkpoint_delete"]
    assert {entry["tinker_path"] for entry in noted} == {saved["path"]}
    assert [entry["purpose"] for entry in noted] == [None, "training", None]
    assert all(entry["event_details"]["actor"] == "urn:tuft:tenant:alice" for entry in noted)
    assert not any(entry.get("model_id") == run_id for entry in entries(server.bob))


def test_entries_of_other_kinds_have_no_deprecated_fields(server: Served) -> None:
    server.services.tenants.create_key("alice")
    post(server.alice, "create_session", project_id=SHARED_PROJECT)
    key, project = (
        entries(server.alice, event_type="organizations")[-1],
        entries(server.alice, event_type="projects")[-1],
    )
    assert (key["event"], project["event"]) == ("key_create", "project_session_assign")
    assert project["event_details"]["project_id"] == SHARED_PROJECT
    assert "tinker_path" not in key
    assert entries(server.alice, event_type="teams") == []
    assert entries(server.alice, day="2020-02-29") == []


@pytest.mark.parametrize("query", [{"event_type": "x"}, {"day": "tomorrow"}, {"day": "2020-02-30"}])
def test_what_cannot_be_asked_is_named(server: Served, query: dict[str, str]) -> None:
    response = server.alice.get("/api/v1/audit", params=query)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(next(iter(query)))
