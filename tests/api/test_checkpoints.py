"""Who may do what with a checkpoint, for how long, and under which further names."""

from __future__ import annotations

import asyncio
import datetime

import httpx
import pytest
from structlog.testing import capture_logs

from tests.api.calls import ALICE, BASE_MODEL, BOB, new_session, post, result
from tests.api.conftest import Served
from tuft.records import CheckpointPath, now

WRONG = "tml-nobody-has-this-one"


@pytest.fixture
def path(server: Served, run_id: str) -> str:
    """A training checkpoint of alice's."""
    submitted = post(server.alice, "save_weights", model_id=run_id, seq_id=1, path="x", user_metadata={"k": "v"})
    return str(result(server.alice, submitted)["path"])


def url(path: str, action: str = "") -> str:
    run_id, _, checkpoint_id = path.removeprefix("tinker://").partition("/")
    return f"/api/v1/training_runs/{run_id}/checkpoints/{checkpoint_id}{action}"


def shown(client: httpx.Client, path: str) -> dict[str, object]:
    found: dict[str, object]
    (found,) = [one for one in client.get("/api/v1/checkpoints").json()["checkpoints"] if one["tinker_path"] == path]
    return found


def delete_all_but(path: str, client: httpx.Client) -> None:
    for checkpoint in client.get("/api/v1/checkpoints").json()["checkpoints"]:
        if checkpoint["tinker_path"] != path:
            client.delete(url(checkpoint["tinker_path"]))


def copied(client: httpx.Client, path: str, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
    return client.post("/api/v1/copy_weights", json={"source_path": path, **fields}, headers=headers)


def test_saving_over_a_name_leaves_nothing_of_what_it_meant(server: Served, run_id: str, path: str) -> None:
    server.alice.post(url(path, "/publish"))
    server.alice.put(url(path, "/ttl"), json={"ttl_seconds": 3600})
    again = {"model_id": run_id, "path": "x", "user_metadata": {"epoch": "2"}}
    assert "exists already" in result(server.alice, post(server.alice, "save_weights", seq_id=2, **again))["error"]
    saved = result(server.alice, post(server.alice, "save_weights", seq_id=3, overwrite=True, **again))
    assert saved["path"] == path
    now_shown = shown(server.alice, path)
    assert (now_shown["user_metadata"], now_shown["expires_at"], now_shown["public"]) == ({"epoch": "2"}, None, False)


def test_publishing_twice_is_no_conflict_which_the_sdk_would_retry_for_minutes(server: Served, path: str) -> None:
    for action, public in (("post", True), ("post", True), ("delete", False), ("delete", False)):
        assert server.alice.request(action, url(path, "/publish")).status_code == 204
        assert shown(server.alice, path)["public"] is public


def test_what_is_published_can_be_read_by_everyone_and_changed_by_its_owner_alone(server: Served, path: str) -> None:
    assert post(server.bob, "weights_info", tinker_path=path).status_code == 404
    server.alice.post(url(path, "/publish"))
    assert post(server.bob, "weights_info", tinker_path=path).json()["base_model"] == BASE_MODEL
    changes = [("delete", ""), ("post", "/publish"), ("delete", "/publish"), ("put", "/ttl")]
    answers = [server.bob.request(method, url(path, action), json={"ttl_seconds": 3600}) for method, action in changes]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert server.bob.get("/api/v1/checkpoints").json()["checkpoints"] == []
    run_url = url(path).partition("/checkpoints")[0]
    assert server.bob.get(run_url, params={"access_scope": "accessible"}).status_code == 404, "the run is not"
    assert shown(server.alice, path)["expires_at"] is None


def test_whoever_owns_a_checkpoint_sees_in_the_audit_log_what_others_did_with_it(server: Served, path: str) -> None:
    server.alice.post(url(path, "/publish"))
    copy = copied(server.bob, path, destination_project_id="p").json()["tinker_path"]
    server.bob.get(url(path, "/archive"))
    server.alice.put(url(path, "/ttl"), json={"ttl_seconds": 3600})
    server.alice.delete(url(path, "/publish"))
    server.bob.get(url(path, "/archive"))
    server.alice.delete(url(path))
    server.bob.delete(url(copy))

    def noted(client: httpx.Client, path: str) -> list[tuple[str, str, str | None]]:
        entries = client.get("/api/v1/audit", params={"event_type": "checkpoints"}).json()["entries"]
        return [
            (entry["event"], entry["event_details"]["actor"].rpartition(":")[2], entry["purpose"])
            for entry in entries
            if entry["tinker_path"] == path
        ]

    reads = [("checkpoint_read", "bob", "copy"), ("checkpoint_read", "bob", "download")]
    assert noted(server.bob, path) == reads
    assert noted(server.alice, path) == [
        ("checkpoint_save", "alice", None),
        ("checkpoint_publish", "alice", None),
        *reads,
        ("checkpoint_ttl_set", "alice", None),
        ("checkpoint_unpublish", "alice", None),
        ("checkpoint_delete", "alice", None),
    ]
    assert noted(server.bob, copy) == [("checkpoint_save", "bob", None), ("checkpoint_delete", "bob", None)]
    assert noted(server.alice, copy) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"ttl_seconds": 3599}, "ttl_seconds: got 3599; must be 3600 to"),
        ({"ttl_seconds": 10**9}, "ttl_seconds: got 1000000000; must be 3600 to"),
        ({"ttl_seconds": "3600"}, "ttl_seconds: got '3600'; must be a valid integer"),
        ({}, "ttl_seconds: got None; is required"),
    ],
)
def test_a_ttl_is_an_hour_to_ten_years_or_said_to_be_none(
    server: Served, path: str, body: dict[str, object], problem: str
) -> None:
    assert server.alice.put(url(path, "/ttl"), json={"ttl_seconds": 7200}).status_code == 204
    before = shown(server.alice, path)["expires_at"]
    refused = server.alice.put(url(path, "/ttl"), json=body)
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith(problem)
    assert shown(server.alice, path)["expires_at"] == before
    assert server.alice.put(url(path, "/ttl"), json={"ttl_seconds": None}).status_code == 204
    assert shown(server.alice, path)["expires_at"] is None


def test_one_that_expires_within_a_day_is_named_when_a_session_begins(server: Served, path: str) -> None:
    delete_all_but(path, server.alice)
    server.alice.put(url(path, "/ttl"), json={"ttl_seconds": 7 * 24 * 3600})
    assert "warning_message" not in post(server.alice, "create_session").json()
    server.alice.put(url(path, "/ttl"), json={"ttl_seconds": 3600})
    warning = post(server.alice, "create_session").json()["warning_message"]
    assert f"expire within 24 hours: {path} at {now() + datetime.timedelta(hours=1):%Y-%m-%d %H:}" in warning
    assert "warning_message" not in post(server.bob, "create_session").json()
    for number in range(6):
        copied(server.alice, path, destination_project_id=f"many-{number}", ttl_seconds=7200)
    warning = post(server.alice, "create_session").json()["warning_message"]
    assert (warning.count("tinker://"), " and 2 more; " in warning) == (5, True)
    delete_all_but("", server.alice)
    assert "warning_message" not in post(server.alice, "create_session").json()


def test_an_expired_one_is_gone_at_once_and_its_files_with_the_sweep(server: Served, path: str) -> None:
    server.alice.post(url(path, "/publish"))
    checkpoints = server.services.checkpoints
    checkpoint = checkpoints.at(CheckpointPath.parse(path))
    assert checkpoint is not None
    directory = server.services.config.home / "checkpoints" / checkpoint.directory
    assert directory.is_dir()
    with capture_logs() as logs:  # the server's own sweep may come first
        checkpoints._catalog.set_expiry(checkpoint.path, now() - datetime.timedelta(seconds=1))
        assert post(server.alice, "weights_info", tinker_path=path).status_code == 404
        assert post(server.bob, "weights_info", tinker_path=path).status_code == 404
        asyncio.run(checkpoints.expire())
        asyncio.run(checkpoints.expire())
    assert [entry["path"] for entry in logs if entry["event"] == "a checkpoint has expired"] == [path]
    assert not directory.exists()


def test_a_copy_outlives_its_source_which_shares_its_files(server: Served, path: str) -> None:
    server.alice.put(url(path, "/ttl"), json={"ttl_seconds": 3600})
    server.alice.post(url(path, "/publish"))
    copy = copied(server.bob, path, destination_project_id="archive", ttl_seconds=7200).json()["tinker_path"]
    assert copy.endswith(":train:0/weights/x")
    theirs, ours = shown(server.alice, path), shown(server.bob, copy)
    assert (ours["size_bytes"], ours["user_metadata"]) == (theirs["size_bytes"], {"k": "v"})
    assert (ours["public"], ours["checkpoint_type"]) == (False, "training")
    assert str(ours["expires_at"]) > str(theirs["expires_at"])
    server.alice.delete(url(path))
    assert server.alice.get(url(copy, "/archive")).status_code == 404
    session_id = new_session(server.bob)
    created = post(server.bob, "load_weights", session_id=session_id, model_seq_id=0, path=copy, optimizer=True)
    assert result(server.bob, created)["path"] == copy

    (run,) = server.bob.get("/api/v1/training_runs", params={"project_id": "archive"}).json()["training_runs"]
    assert (run["base_model"], run["lora_rank"], run["corrupted"]) == (BASE_MODEL, 4, False)
    assert run["user_metadata"] == {"copied_from": path}
    assert run["last_checkpoint"]["tinker_path"] == copy
    stepped = post(server.bob, "optim_step", model_id=run["training_run_id"], seq_id=1, adam_params={})
    assert "is unloaded" in result(server.bob, stepped)["error"]
    assert server.bob.delete(url(copy)).status_code == 204
    server.bob.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})


def test_a_copy_that_is_asked_for_again_is_the_same(server: Served, path: str, session_id: str) -> None:
    by_key = [
        copied(server.alice, path, {"X-Idempotency-Key": key}, destination_project_id="p")
        for key in ("once", "once", "twice")
    ]
    by_slot = [copied(server.alice, path, session_id=session_id, model_seq_id=7) for _ in range(2)]
    assert by_key.pop().json() != by_key[0].json()
    for first, second in (by_key, by_slot):
        assert first.status_code == 200
        assert first.json() == second.json()
    assert by_slot[0].json()["tinker_path"] == f"tinker://{session_id}:train:7/weights/x"
    other = copied(server.alice, path.replace("weights/x", "weights/y"), session_id=session_id, model_seq_id=7)
    assert other.json()["detail"].endswith("holds something else already")
    assert copied(server.alice, path, session_id=session_id, model_seq_id=0).status_code == 400, "there is a run"
    server.alice.delete(url(by_slot[0].json()["tinker_path"]))
    assert copied(server.alice, path, session_id=session_id, model_seq_id=7).json() == by_slot[0].json(), "made again"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "destination_project_id: got None; give it, or session_id and model_seq_id"),
        ({"destination_project_id": "p", "model_seq_id": 1}, "destination_project_id: got 'p'; give it, or"),
        ({"model_seq_id": 1}, "session_id: got None; is required"),
        ({"session_id": "s"}, "model_seq_id: got None; is required"),
        ({"destination_project_id": "p", "ttl_seconds": 1}, "ttl_seconds: got 1; must be 3600 to"),
        ({"destination_project_id": "p", "source_path": "tinker://a/b"}, "path: got 'tinker://a/b'; must read"),
        ({"destination_project_id": "a\nb"}, "project_id: got 'a\\nb'; must be 1 to 128 printable"),
        ({"destination_project_id": "p", "weights_access_token": WRONG}, "weights_access_token: got '…-one'; must be"),
    ],
)
def test_a_copy_that_cannot_be_made_says_why(
    server: Served, path: str, fields: dict[str, object], problem: str
) -> None:
    response = post(server.alice, "copy_weights", **{"source_path": path, **fields})
    assert response.status_code == 400
    assert response.json()["detail"].startswith(problem)


def test_the_owners_key_opens_a_checkpoint_to_another_tenant(server: Served, path: str) -> None:
    """By header for a copy, in the body for a load; a wrong one is no 401, which would mean the caller's own."""
    assert copied(server.bob, path, destination_project_id="p").status_code == 404
    assert copied(server.bob, path, destination_project_id="p", weights_access_token=BOB).status_code == 404
    headers = {"X-Tinker-Weights-Access-Token": ALICE}
    copy = copied(server.bob, path, headers, destination_project_id="p").json()["tinker_path"]
    session_id = new_session(server.bob)
    fields = {"session_id": session_id, "path": path, "optimizer": False}
    refused = post(server.bob, "load_weights", model_seq_id=0, weights_access_token=WRONG, **fields)
    assert (refused.status_code, "weights_access_token: got '…-one'" in refused.text) == (400, True)
    created = result(server.bob, post(server.bob, "load_weights", model_seq_id=1, weights_access_token=ALICE, **fields))
    live = {"model_id": created["model_id"], "path": path}
    opened = post(server.bob, "load_weights", seq_id=1, weights_access_token=ALICE, **live)
    assert result(server.bob, opened)["path"] == path
    closed = result(server.bob, post(server.bob, "load_weights", seq_id=2, weights_access_token=WRONG, **live))
    assert (closed["category"], "weights_access_token" in closed["error"]) == ("user", True)
    closed = result(server.bob, post(server.bob, "load_weights", seq_id=3, **live))
    assert "no checkpoint" in closed["error"]
    server.bob.delete(url(copy))
    server.bob.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})
