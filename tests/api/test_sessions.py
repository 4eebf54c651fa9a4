"""How a client begins and ends."""

from __future__ import annotations

from tinker.types import ClientConfigResponse, ClientDynamicConfigResponse, GetServerCapabilitiesResponse

from tests.api.calls import ALIAS, BASE_MODEL, SHARED_PROJECT, post
from tests.api.conftest import Served


def test_the_client_configuration_is_what_the_sdk_understands(server: Served) -> None:
    answer = post(server.alice, "client/config", sdk_version="0.38.0").json()
    config = ClientConfigResponse.model_validate(answer)
    assert config.parallel_fwdbwd_chunks
    assert config.proto_compress_fwdbwd
    assert config.pjwt_auth_enabled
    assert config.custom_loss_server_side
    assert config.sample_use_retrieve_futures
    ClientDynamicConfigResponse.model_validate(post(server.alice, "client/dynamic_config", sdk_version="0").json())


def test_the_capabilities_name_every_model_and_alias(server: Served) -> None:
    answer = server.alice.get("/api/v1/get_server_capabilities").json()
    models = GetServerCapabilitiesResponse.model_validate(answer).supported_models
    assert [model.model_name for model in models] == [BASE_MODEL, ALIAS]
    assert all(model.max_context_length == 512 and model.trainable and model.sampleable for model in models)


def test_a_session_lives_until_it_is_finished(server: Served) -> None:
    created = post(
        server.alice,
        "create_session",
        tags=["a"],
        user_metadata={"k": "v"},
        sdk_version="0.38.0",
        display_name="mine",
        type="create_session",
    ).json()
    session_id = created["session_id"]
    assert "/" not in session_id
    assert created["type"] == "create_session"
    assert post(server.alice, "session_heartbeat", session_id=session_id).json() == {"type": "session_heartbeat"}
    shown = server.alice.get(f"/api/v1/sessions/{session_id}").json()
    assert shown == {
        "training_run_ids": [],
        "sampler_ids": [],
        "user_metadata": {"k": "v"},
        "display_name": "mine",
    }
    assert session_id in server.alice.get("/api/v1/sessions").json()["sessions"]
    finish = {"reason": {"type": "success"}, "detail": None}
    assert server.alice.post(f"/api/v1/sessions/{session_id}/finish", json=finish).status_code == 200
    assert post(server.alice, "session_heartbeat", session_id=session_id).status_code == 410


def test_a_session_of_the_oldest_sdks_needs_no_field(server: Served) -> None:
    assert post(server.alice, "create_session", user_metadata=None).json()["session_id"]


def test_a_project_of_others_is_to_us_a_label_like_any_other(server: Served, session_id: str) -> None:
    made = post(server.alice, "create_session", tags=[], project_id="bobs")
    moved = server.alice.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "bobs"})
    assert (made.status_code, moved.status_code) == (200, 204)
    search = {"project_ids": ["bobs"], "owner": {"type": "accessible"}}
    ours = {found["session_id"] for found in post(server.alice, "sessions/search", **search).json()["sessions"]}
    assert {session_id, made.json()["session_id"]} <= ours
    theirs = {found["session_id"] for found in post(server.bob, "sessions/search", **search).json()["sessions"]}
    assert not ours & theirs


def test_a_session_moves_between_projects_and_only_its_owner_moves_it(server: Served, session_id: str) -> None:
    def project_of() -> str:
        (found,) = post(server.alice, "sessions/search", session_id=session_id).json()["sessions"]
        return str(found["project_id"])

    path = f"/api/v1/sessions/{session_id}/project"
    assert project_of() == "default"
    for project_id in (SHARED_PROJECT, "mine alone", "default", SHARED_PROJECT):
        moved = server.alice.put(path, json={"project_id": project_id})
        assert (moved.status_code, moved.content) == (204, b"")
        assert project_of() == project_id
    assert server.bob.put(path, json={"project_id": SHARED_PROJECT}).status_code == 404
    assert server.alice.put(path, json={}).json()["detail"] == "project_id: got None; is required"
    assert server.alice.put("/api/v1/sessions/x/project", json={"project_id": SHARED_PROJECT}).status_code == 404


def test_a_members_session_is_read_by_the_others_and_ended_by_its_owner_alone(server: Served) -> None:
    created = post(server.alice, "create_session", project_id=SHARED_PROJECT, display_name="shared").json()
    session_id = created["session_id"]
    path = f"/api/v1/sessions/{session_id}"
    assert server.bob.get(path).status_code == 404
    assert server.bob.get(path, params={"access_scope": "owned"}).status_code == 404
    assert server.bob.get(path, params={"access_scope": "accessible"}).json()["display_name"] == "shared"
    for scope, seen in (("owned", False), ("accessible", True)):
        listed = server.bob.get("/api/v1/sessions", params={"access_scope": scope}).json()["sessions"]
        assert (session_id in listed) is seen
    assert server.bob.post(f"{path}/finish", json={"reason": {"type": "success"}}).status_code == 404
    assert post(server.bob, "session_heartbeat", session_id=session_id).status_code == 410
    assert post(server.alice, "session_heartbeat", session_id=session_id).status_code == 200


def test_telemetry_is_accepted_and_the_connection_stays_usable(server: Served) -> None:
    for _ in range(2):
        response = post(server.alice, "telemetry", events=[{"event": "X", "data": "y" * 200_000}], session_id="s")
        assert response.json() == {"status": "accepted"}
