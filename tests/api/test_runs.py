"""What a tenant sees of its runs and checkpoints."""

from __future__ import annotations

import pytest
from tinker.types import CheckpointsListResponse, TrainingRun, TrainingRunsResponse, WeightsInfoResponse

from tests.api.calls import BASE_MODEL, SHARED_PROJECT, post, result
from tests.api.conftest import Served


def save(server: Served, run_id: str, seq_id: int, route: str, name: str, **fields: object) -> str:
    submitted = post(server.alice, route, model_id=run_id, seq_id=seq_id, path=name, **fields)
    return str(result(server.alice, submitted)["path"])


def test_an_sdk_that_is_older_than_external_weights_does_not_see_them(server: Served, run_id: str) -> None:
    save(server, run_id, 1, "save_weights", "state")
    save(server, run_id, 2, "save_weights_external", "export")
    for route in (f"training_runs/{run_id}/checkpoints", "checkpoints?limit=10000"):
        seen = []
        for agent in ("AsyncTinker/Python 0.27.2", "AsyncTinker/Python 0.28.0", "curl"):
            listed = server.alice.get(f"/api/v1/{route}", headers={"User-Agent": agent}).json()["checkpoints"]
            seen.append({found["checkpoint_id"] for found in listed if run_id in found["tinker_path"]})
        everything = {"weights/state", "external_weights/export"}
        assert seen == [{"weights/state"}, everything, everything]


@pytest.mark.calls("GET /api/v1/models/{}/checkpoints")
def test_a_run_shows_its_newest_checkpoints(server: Served, run_id: str) -> None:
    save(server, run_id, 1, "save_weights", "old", ttl_seconds=3600)
    newest = save(server, run_id, 2, "save_weights", "new", user_metadata={"epoch": "1"})
    sampler = save(server, run_id, 3, "save_weights_for_sampler", "frozen")
    run = TrainingRun.model_validate(server.alice.get(f"/api/v1/training_runs/{run_id}").json())
    assert (run.training_run_id, run.base_model, run.model_owner) == (run_id, BASE_MODEL, "alice")
    assert (run.is_lora, run.lora_rank, run.corrupted) == (True, 4, False)
    assert run.user_metadata == {"purpose": "tests", "number": "1"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == newest
    assert run.last_checkpoint.user_metadata == {"epoch": "1"}
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == sampler

    listed = server.alice.get(f"/api/v1/training_runs/{run_id}/checkpoints").json()
    assert server.alice.get(f"/api/v1/models/{run_id}/checkpoints").json() == listed
    checkpoints = CheckpointsListResponse.model_validate(listed).checkpoints
    assert [checkpoint.checkpoint_id for checkpoint in checkpoints] == [
        "sampler_weights/frozen",
        "weights/new",
        "weights/old",
    ]
    assert [checkpoint.checkpoint_type for checkpoint in checkpoints] == ["sampler", "training", "training"]
    assert all(checkpoint.size_bytes and not checkpoint.public for checkpoint in checkpoints)
    assert [checkpoint.expires_at is not None for checkpoint in checkpoints] == [False, False, True]


def test_lists_come_in_pages(server: Served, run_id: str) -> None:
    everything = server.alice.get("/api/v1/training_runs", params={"limit": 1000}).json()
    page = server.alice.get("/api/v1/training_runs", params={"limit": 1, "access_scope": "owned"}).json()
    assert [run.training_run_id for run in TrainingRunsResponse.model_validate(page).training_runs] == [run_id]
    assert page["cursor"] == {"offset": 0, "limit": 1, "total_count": len(everything["training_runs"])}
    theirs = server.bob.get("/api/v1/training_runs", params={"limit": 1000}).json()["training_runs"]
    assert run_id not in [run["training_run_id"] for run in theirs]


def test_a_project_shows_its_members_each_others_runs_and_checkpoints(
    server: Served, run_id: str, session_id: str
) -> None:
    path = save(server, run_id, 1, "save_weights", "mine")
    url, accessible = f"/api/v1/training_runs/{run_id}", {"access_scope": "accessible"}
    assert server.bob.get(url, params=accessible).status_code == 404
    assert server.bob.get(f"{url}/checkpoints").status_code == 404
    assert post(server.bob, "weights_info", tinker_path=path).status_code == 404

    moved = server.alice.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": SHARED_PROJECT})
    assert moved.status_code == 204
    assert server.bob.get(url).status_code == 404, "it is not his own"
    assert server.bob.get(url, params=accessible).json()["model_owner"] == "alice"
    listed = server.bob.get("/api/v1/training_runs", params={**accessible, "project_id": SHARED_PROJECT}).json()
    assert [run["training_run_id"] for run in listed["training_runs"]] == [run_id]
    assert listed["cursor"]["total_count"] == 1
    assert listed["training_runs"][0]["last_checkpoint"]["tinker_path"] == path
    owned = server.bob.get("/api/v1/training_runs", params={"project_id": SHARED_PROJECT}).json()
    assert (owned["training_runs"], owned["cursor"]["total_count"]) == ([], 0)
    (checkpoint,) = server.bob.get(f"{url}/checkpoints").json()["checkpoints"]
    assert checkpoint["tinker_path"] == path
    assert post(server.bob, "weights_info", tinker_path=path).status_code == 200
    assert server.bob.delete(f"{url}/checkpoints/weights/mine").status_code == 404

    server.alice.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "default"})
    assert server.bob.get(f"{url}/checkpoints").status_code == 404
    default = server.alice.get("/api/v1/training_runs", params={"project_id": "default", "limit": 1}).json()
    assert default["training_runs"][0]["training_run_id"] == run_id


def test_a_scope_that_does_not_exist_is_named(server: Served) -> None:
    response = server.alice.get("/api/v1/training_runs", params={"access_scope": "all"})
    assert response.status_code == 400
    assert response.json()["detail"] == "access_scope: got 'all'; must be 'owned' or 'accessible'"


def test_a_deleted_checkpoint_is_gone_for_its_owner_and_never_for_another(server: Served, run_id: str) -> None:
    path = save(server, run_id, 1, "save_weights", "mine")
    url = f"/api/v1/training_runs/{run_id}/checkpoints/weights/mine"
    assert server.bob.delete(url).status_code == 404
    assert post(server.bob, "weights_info", tinker_path=path).status_code == 404
    info = WeightsInfoResponse.model_validate(post(server.alice, "weights_info", tinker_path=path).json())
    assert (info.base_model, info.lora_rank, info.train_mlp) == (BASE_MODEL, 4, True)
    mine = server.alice.get("/api/v1/checkpoints").json()
    assert path in {checkpoint["tinker_path"] for checkpoint in mine["checkpoints"]}
    theirs = server.bob.get("/api/v1/checkpoints").json()
    assert path not in {checkpoint["tinker_path"] for checkpoint in theirs["checkpoints"]}
    assert server.alice.delete(url).status_code == 204
    assert post(server.alice, "weights_info", tinker_path=path).status_code == 404
    assert server.alice.delete(url).status_code == 404


def test_a_path_of_another_shape_is_named(server: Served) -> None:
    response = post(server.alice, "weights_info", tinker_path="tinker://a/b")
    assert response.status_code == 400
    assert response.json()["detail"].startswith("path: got 'tinker://a/b'; must read tinker://")
