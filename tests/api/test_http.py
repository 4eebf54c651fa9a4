"""Statuses and error bodies, on which the SDK acts."""

from __future__ import annotations

import pytest

from tests.api.calls import BASE_MODEL, post
from tests.api.conftest import Served
from tuft import errors
from tuft.api.http import status_of


def subclasses(kind: type[errors.TuftError]) -> list[type[errors.TuftError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in subclasses(child))]


EXPECTED = {
    "Unauthorized": 401,
    "InvalidToken": 401,
    "Forbidden": 403,
    "NotFound": 404,
    "Gone": 410,
    "TooLarge": 413,
    "QuotaExceeded": 429,
    "InvalidInput": 400,
    "RunLost": 400,
    "UserError": 400,
    "ModelError": 503,
    "EngineDied": 503,
    "Overloaded": 503,
    "StorageError": 503,
    "_DiskFull": 503,
    "Damaged": 422,
    "CapReached": 429,
    "SeqReused": 400,
}


@pytest.mark.parametrize("kind", subclasses(errors.TuftError), ids=lambda kind: str(kind.__name__))
def test_every_error_has_the_status_that_the_sdk_needs(kind: type[errors.TuftError]) -> None:
    error = kind("field", 1, "allowed") if kind is errors.InvalidInput else kind("message")
    assert status_of(error) == EXPECTED.get(kind.__name__, 500)


def test_a_client_error_has_a_detail_and_a_content_length(server: Served) -> None:
    response = post(server.alice, "create_model", session_id="s", model_seq_id=0, base_model="no/such")
    assert response.status_code == 400
    assert response.json() == {"detail": f"base_model: got 'no/such'; this server has '{BASE_MODEL}'"}
    assert int(response.headers["content-length"]) == len(response.content) > 0


def test_a_route_that_does_not_exist_is_named(server: Served) -> None:
    response = server.alice.post("/api/v1/no_such_route", json={})
    assert response.status_code == 404
    assert response.json() == {"detail": "this server does not know POST /api/v1/no_such_route"}


def test_a_ready_server_says_so_and_names_its_models(server: Served) -> None:
    response = server.anyone.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "base_models": [BASE_MODEL]}


def test_health_and_the_front_page_need_no_key(server: Served) -> None:
    assert server.anyone.get("/api/v1/healthz").json() == {"status": "ok"}
    assert server.anyone.get("/").json()["name"] == "TuFT"
    assert server.anyone.get("/docs").status_code == 200


def test_while_the_model_loads_the_process_is_healthy_and_not_ready(loading_server: Served) -> None:
    assert loading_server.anyone.get("/api/v1/healthz").status_code == 200
    response = loading_server.anyone.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"detail": "the base models are still loading"}


def test_while_the_model_loads_the_sdk_is_told_to_come_back(loading_server: Served) -> None:
    session_id = post(loading_server.alice, "create_session", tags=[]).json()["session_id"]
    answers = [
        loading_server.alice.get("/api/v1/get_server_capabilities"),
        post(loading_server.alice, "create_model", session_id=session_id, model_seq_id=0, base_model=BASE_MODEL),
        post(
            loading_server.alice,
            "create_sampling_session",
            session_id=session_id,
            sampling_session_seq_id=0,
            base_model=BASE_MODEL,
        ),
        loading_server.anyone.get(f"/{BASE_MODEL}/resolve/main/config.json"),
    ]
    for response in answers:
        assert response.status_code == 503
        assert "loading" in response.json()["detail"]
        assert 0 < int(response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("limit=0", "limit: got '0'; must be greater than or equal to 1"),
        ("offset=-1", "offset: got '-1'; must be greater than or equal to 0"),
        ("limit=many", "limit: got 'many'; must be a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_wrong_query_parameter_is_named(server: Served, query: str, detail: str) -> None:
    response = server.alice.get(f"/api/v1/training_runs?{query}")
    assert response.status_code == 400
    assert response.json() == {"detail": detail}
