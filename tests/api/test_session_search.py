"""The search as the wire has it; which sessions are found is the store's (tests/store/test_sessions.py)."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest
from tinker.types import SessionSearchResponse

from tests.api.calls import SHARED_PROJECT, post
from tests.api.conftest import Served


def search(client: httpx.Client, **fields: Any) -> SessionSearchResponse:
    response = post(client, "sessions/search", **fields)
    assert response.status_code == 200, response.text
    return SessionSearchResponse.model_validate(response.json())


def new_sessions(client: httpx.Client, number: int, **fields: Any) -> tuple[str, list[str]]:
    """Sessions with a word of their own in their names, newest first."""
    word = uuid4().hex
    ids = []
    for index in range(number):
        created = post(client, "create_session", display_name=f"Run {index} of {word}", **fields).json()
        ids.append(str(created["session_id"]))
    return word, ids[::-1]


def test_a_summary_says_all_there_is_to_say(server: Served) -> None:
    word, (session_id,) = new_sessions(server.alice, 1, user_metadata={"n": 1}, project_id="my label")
    (found,) = search(server.alice, display_name=word.upper()).sessions
    assert found.model_dump(mode="json", exclude={"created_at"}) == {
        "session_id": session_id,
        "owner": "urn:tuft:tenant:alice",
        "project_id": "my label",
        "status": {"type": "active"},
        "checkpoints_count": 0,
        "display_name": f"Run 0 of {word}",
        "user_metadata": {"n": "1"},
        "checkpoint_storage_bytes": 0,
    }


def test_pages_follow_each_other_by_the_cursor(server: Served) -> None:
    word, ids = new_sessions(server.alice, 5)
    found: list[str] = []
    cursor, num_pages = None, 0
    while num_pages == 0 or cursor is not None:
        page = search(server.alice, display_name=word, limit=2, cursor=cursor)
        found += [summary.session_id for summary in page.sessions]
        cursor = page.next_cursor and page.next_cursor.model_dump(mode="json")
        num_pages += 1
    assert (found, num_pages) == (ids, 3)


def test_a_finished_session_says_how(server: Served) -> None:
    word, (session_id,) = new_sessions(server.alice, 1)
    finish = {"reason": {"type": "errored"}, "detail": "KeyError"}
    server.alice.post(f"/api/v1/sessions/{session_id}/finish", json=finish)
    for reasons, expected in ((None, 1), (["errored"], 1), (["success"], 0)):
        query = {"type": "client_finished", **({"reasons": reasons} if reasons else {})}
        found = search(server.alice, display_name=word, statuses=[query]).sessions
        assert len(found) == expected
    status = search(server.alice, display_name=word).sessions[0].status
    assert status is not None
    assert status.model_dump() == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "KeyError"}


def test_others_are_found_in_a_shared_project_alone(server: Served) -> None:
    word, (shared,) = new_sessions(server.alice, 1, project_id=SHARED_PROJECT)
    post(server.alice, "create_session", display_name=word, project_id="label")

    def seen(**owner: Any) -> list[str]:
        return [summary.session_id for summary in search(server.bob, display_name=word, owner=owner).sessions]

    assert seen(type="own") == seen() == []
    assert seen(type="accessible") == [shared]
    assert seen(type="user", owner_urns=["urn:tuft:tenant:alice"]) == [shared]
    assert seen(type="user", owner_urns=["urn:tuft:tenant:bob", "urn:tuft:tenant:x"]) == []
    named = search(server.bob, display_name=word, owner={"type": "accessible"}, project_ids=["label", SHARED_PROJECT])
    assert [summary.session_id for summary in named.sessions] == [shared]
    assert search(server.alice, display_name=word, project_ids=["bobs"]).sessions == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"display_name": ""}, "display_name"),
        ({"display_name": "  "}, "display_name"),
        ({"display_name": "a " * 51}, "display_name"),
        ({"statuses": []}, "statuses"),
        ({"statuses": [{"type": "asleep"}]}, "statuses.0.type"),
        ({"owner": {"type": "user"}}, "owner.owner_urns"),
        ({"owner": {"type": "user", "owner_urns": ["alice"]}}, "owner.owner_urns"),
        ({"project_ids": ["p"] * 201}, "project_ids"),
        ({"project_ids": [""]}, "project_id"),
        ({"user_metadata": {str(number): "" for number in range(51)}}, "user_metadata"),
        ({"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "x"}}, "cursor.last_created_at"),
        ({"cursor": {"last_created_at": "0001-01-01T00:00:00+09:00", "last_session_id": ""}}, "cursor.last_created_at"),
    ],
)
def test_what_cannot_be_searched_for_is_named(server: Served, fields: dict[str, Any], named: str) -> None:
    response = post(server.alice, "sessions/search", **fields)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(f"{named}: ")
