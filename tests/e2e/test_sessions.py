"""What the SDK's REST and admin clients tell of sessions, of who asks, and of what was used."""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import tinker
from tinker import types
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from tests.conftest import TEAM, TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import TOKENS, datum
from tuft.records import now


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@contextmanager
def ended(server: LiveServer, key: str, **options: Any) -> Iterator[tinker.ServiceClient]:
    """A client whose session is finished at the end."""
    client = tinker.ServiceClient(base_url=server.url, api_key=key, **options)
    yield client
    client.close("success").result()


def rest_client(server: LiveServer, key: str) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=key)


def session_of(client: tinker.ServiceClient) -> str:
    return client.holder.get_session_id()


@pytest.fixture(scope="module")
def worked(tiny_server: LiveServer) -> tuple[str, str, str]:
    """A session in the shared project that has trained, saved and sampled: key, session id and run id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        key = tiny_server.create_key(f"{TEAM}-1")
        about = {"project_id": TEAM, "display_name": "Nightly training", "user_metadata": {"purpose": "tests"}}
        client = tinker.ServiceClient(base_url=tiny_server.url, api_key=key, **about)
        training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
        training.forward_backward([datum()], "cross_entropy").result()
        training.optim_step(types.AdamParams()).result()
        training.save_state("saved").result()
        sampler = client.create_sampling_client(base_model=TINY_MODEL).result()
        params = types.SamplingParams(max_tokens=3, stop=[])
        sampler.sample(types.ModelInput.from_ints(TOKENS), 2, params).result()
        run_id = training.get_info().model_id
        session_id = session_of(client)
        client.close("interrupted", detail="enough").result()
    return key, session_id, run_id


@pytest.mark.calls(
    "POST /api/v1/create_session", "POST /api/v1/sessions/{}/finish", "GET /api/v1/sessions", "GET /api/v1/sessions/{}"
)
def test_a_session_is_listed_with_what_was_made_in_it(tiny_server: LiveServer, worked: tuple[str, str, str]) -> None:
    key, session_id, run_id = worked
    rest = rest_client(tiny_server, key)
    assert rest.list_sessions(limit=1).result().sessions == [session_id]
    shown = rest.get_session(session_id).result()
    assert shown.training_run_ids == [run_id]
    assert shown.sampler_ids == [f"{session_id}:sample:0"]
    assert (shown.display_name, shown.user_metadata) == ("Nightly training", {"purpose": "tests"})


def test_a_fellow_member_sees_the_session_and_nobody_else(
    tiny_server: LiveServer, worked: tuple[str, str, str]
) -> None:
    _, session_id, run_id = worked
    fellow = rest_client(tiny_server, tiny_server.create_key(f"{TEAM}-2"))
    stranger = rest_client(tiny_server, tiny_server.key)
    assert session_id in fellow.list_sessions(access_scope="accessible").result().sessions
    assert fellow.get_session(session_id, access_scope="accessible").result().training_run_ids == [run_id]
    assert session_id not in fellow.list_sessions().result().sessions
    assert session_id not in stranger.list_sessions(access_scope="accessible").result().sessions
    for rest, scope in ((fellow, "owned"), (stranger, "accessible")):
        with pytest.raises(tinker.NotFoundError):
            rest.get_session(session_id, access_scope=scope).result()  # type: ignore[arg-type]


@pytest.mark.calls("POST /api/v1/sessions/search")
@pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning")
def test_a_search_finds_the_session_by_all_that_is_known_of_it(
    tiny_server: LiveServer, worked: tuple[str, str, str]
) -> None:
    key, session_id, _ = worked
    rest = rest_client(tiny_server, key)
    finished = types.session_status_query.ClientFinishedSessionStatusQuery(reasons=["interrupted"])
    request = types.SessionSearchRequest(
        display_name="training NIGHTLY",
        project_ids=[TEAM],
        user_metadata={"purpose": "tests"},
        owner=types.UserSearchOwner(owner_urns=[f"urn:tuft:tenant:{TEAM}-1"]),
        statuses=[finished],
        limit=1,
    )
    page = rest.search_sessions(request).result()
    (summary,) = page.sessions
    assert (summary.session_id, summary.owner, summary.project_id) == (session_id, f"urn:tuft:tenant:{TEAM}-1", TEAM)
    assert summary.checkpoints_count == 1
    assert (summary.checkpoint_storage_bytes or 0) > 1000
    assert summary.status is not None
    assert summary.status.model_dump() == {
        "type": "client_finished",
        "reason": {"type": "interrupted"},
        "detail": "enough",
    }
    assert page.next_cursor is None
    other = request.model_copy(update={"statuses": [types.session_status_query.ActiveSessionStatusQuery()]})
    assert rest.search_sessions(other).result().sessions == []


@pytest.mark.calls("PUT /api/v1/sessions/{}/project")
@pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning")
def test_a_session_is_moved_into_a_project(tiny_server: LiveServer) -> None:
    key = tiny_server.key
    with ended(tiny_server, key, project_id="one") as client:
        session_id = session_of(client)
        rest = client.create_rest_client()
        assert rest.assign_session_project(session_id, "two").result() is None
        (found,) = rest.search_sessions(types.SessionSearchRequest(project_ids=["two"])).result().sessions
        assert found.session_id == session_id
        rest.assign_session_project(session_id, TEAM).result()  # no member: to them it is a name like any other
        member = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.create_key(f"{TEAM}-1"))
        found = member.create_rest_client().search_sessions(
            types.SessionSearchRequest(project_ids=[TEAM], owner=types.AccessibleSearchOwner())
        )
        assert session_id not in [session.session_id for session in found.result().sessions]


@pytest.mark.calls("GET /api/v1/sessions/{}/trace_export")
def test_a_trace_is_fetched_without_a_key_and_shows_the_work(
    tiny_server: LiveServer, worked: tuple[str, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    key, session_id, run_id = worked
    with caplog.at_level(logging.WARNING):
        url = rest_client(tiny_server, key).export_session_trace(session_id).result()
    assert not caplog.records  # ready at once
    with urllib.request.urlopen(url, timeout=10) as response:
        trace = json.loads(response.read())
    tracks = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert tracks == {"session", run_id, f"{session_id}:sample:0"}
    shown = [event["name"] for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {"create_model", "forward_backward", "optim_step", "save_weights", "sample"} <= set(shown)


@pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning")
@pytest.mark.calls("GET /api/v1/billing/usage/events", "GET /api/v1/billing/usage/checkpoints/current")
def test_usage_is_told_by_the_hour_and_session(tiny_server: LiveServer, worked: tuple[str, str, str]) -> None:
    key, session_id, _ = worked
    admin = tinker.AdminClient(base_url=tiny_server.url, api_key=key)
    hour = now().replace(minute=0, second=0, microsecond=0)
    usage = admin.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).result()
    ours = {event.event_info.type: event for event in usage.data if event.session_id == session_id}
    assert set(ours) == {"training", "sampling_prefill", "sampling_sample", "checkpoint"}
    assert ours["training"].event_info.token_count == len(TOKENS) - 1  # type: ignore[union-attr]
    assert ours["sampling_sample"].event_info.token_count == 6  # type: ignore[union-attr]
    assert {event.project_id for event in ours.values()} == {TEAM}
    assert usage.sessions[session_id].user_metadata == {"purpose": "tests"}
    request = types.SessionSearchRequest(project_ids=[TEAM], limit=200)
    sessions = rest_client(tiny_server, key).search_sessions(request).result().sessions
    storage = admin.get_current_checkpoint_storage_usage(project_id=TEAM).result().data
    (stored,) = [item for item in storage if item.user_name == f"{TEAM}-1"]
    assert stored.checkpoint_count == sum(session.checkpoints_count for session in sessions) >= 1
    assert stored.size_bytes == sum(session.checkpoint_storage_bytes or 0 for session in sessions)
    with pytest.raises(tinker.BadRequestError, match="full hour"):
        admin.get_billing_usage(hour + timedelta(minutes=1), hour + timedelta(hours=2)).result()


@pytest.mark.calls("GET /api/v1/audit")
def test_the_audit_log_tells_who_saved_what(tiny_server: LiveServer, worked: tuple[str, str, str]) -> None:
    key, session_id, run_id = worked
    admin = tinker.AdminClient(base_url=tiny_server.url, api_key=key)
    entries = admin.get_audit_log(day=now().date()).result().entries
    (saved,) = [entry for entry in entries if entry.model_id == run_id]
    assert (saved.event, saved.tinker_path) == ("checkpoint_save", f"tinker://{run_id}/weights/saved")
    assert saved.event_details["actor"] == f"urn:tuft:tenant:{TEAM}-1"
    projects = [entry.event_details for entry in admin.get_audit_log(event_type="projects").result().entries]
    (assigned,) = [details for details in projects if details["session_id"] == session_id]
    assert assigned["project_id"] == TEAM


@pytest.mark.calls("POST /api/v1/auth/token", "POST /api/v1/client/config", "GET /api/v1/get_server_capabilities")
def test_who_am_i_is_read_from_the_token_that_the_key_was_exchanged_for(tiny_server: LiveServer) -> None:
    rest = rest_client(tiny_server, tiny_server.key)
    me = rest.whoami().result()
    assert (me.user_urn, me.org_urn, me.email) == ("urn:tuft:tenant:default", "tml:organization:tuft", None)
    assert [model.model_name for model in rest.get_server_capabilities().result().supported_models] == [
        TINY_MODEL,
        "tiny",
    ]
    token = rest.holder.run_coroutine_threadsafe(rest.holder.get_identity_jwt()).result()
    assert rest_client(tiny_server, token).whoami().result() == me


@pytest.mark.calls(
    "POST /api/v1/session_heartbeat",
    "POST /api/v1/telemetry",
    "POST /api/v1/client/dynamic_config",
    "GET /api/v1/healthz",
)
def test_what_the_sdk_sends_on_its_own_account_is_answered(tiny_server: LiveServer) -> None:
    events = types.TelemetrySendRequest(
        events=[], platform="x", sdk_version="0", session_id="sessionless-1", process_uuid="1"
    )

    async def calls() -> list[Any]:
        with client.holder.aclient(ClientConnectionPoolType.TRAIN) as raw:
            return [
                await raw.service.session_heartbeat(session_id=session_of(client)),
                await raw.telemetry.send(request=events),
                await raw.service.client_dynamic_config(request=types.ClientConfigRequest(sdk_version="0")),
                await raw.service.health_check(),
            ]

    with ended(tiny_server, tiny_server.key) as client:
        heartbeat, telemetry, dynamic, health = client.holder.run_coroutine_threadsafe(calls()).result()
    assert (heartbeat.type, telemetry.status, health.status) == ("session_heartbeat", "accepted", "ok")
    assert dynamic.refresh_interval_sec == 300
