from __future__ import annotations

from typing import Any

from tests.api.calls import SHARED_PROJECT, TOKENS, cross_entropy, post, result
from tests.api.conftest import Served


def test_a_trace_shows_every_operation_of_the_session_on_the_track_of_its_run(
    server: Served, run_id: str, session_id: str, sampler_id: str
) -> None:
    operation = {"model_id": run_id}
    loss = post(server.alice, "forward_backward", seq_id=1, forward_backward_input=cross_entropy(TOKENS), **operation)
    result(server.alice, loss)  # one after the other: what overlaps has a lane of its own
    step = post(server.alice, "optim_step", seq_id=2, adam_params={"learning_rate": 0.5}, **operation)
    result(server.alice, step)
    wrong = post(server.alice, "forward", seq_id=3, forward_input=cross_entropy(TOKENS, loss_fn="x"), **operation)
    prompt = {"chunks": [{"tokens": TOKENS}]}
    sample = post(
        server.alice,
        "asample",
        sampling_session_id=sampler_id,
        seq_id=7,
        prompt=prompt,
        sampling_params={"max_tokens": 3, "stop": []},
    )
    for submitted in (wrong, sample):
        result(server.alice, submitted)
    server.alice.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}})
    export = server.alice.get(f"/api/v1/sessions/{session_id}/trace_export").json()
    assert export["status"] == "ready"
    fetched = server.anyone.get(export["url"])
    assert fetched.status_code == 200
    events = fetched.json()["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    requests = {
        event["name"]: (tracks[event["tid"]], event["args"])
        for event in events
        if event["ph"] == "X" and event["name"] not in ("queued", "running")
    }
    failed = requests.pop("forward")[1]
    assert (failed["seq"], failed["outcome"]) == (3, "failed")
    assert "loss_fn" in failed["error"]
    expected: dict[str, tuple[str, dict[str, Any]]] = {
        "create_model": (run_id, {"seq": 0, "outcome": "ok"}),
        "forward_backward": (
            run_id,
            {"seq": 1, "loss_fn": "cross_entropy", "num_data": 1, "num_tokens": 4, "outcome": "ok"},
        ),
        "optim_step": (run_id, {"seq": 2, "learning_rate": 0.5, "outcome": "ok"}),
        "sample": (
            sampler_id,
            {
                "seq": 7,
                "num_prompt_tokens": 5,
                "num_samples": 1,
                "outcome": "ok",
                "num_cached_tokens": requests["sample"][1]["num_cached_tokens"],
                "num_tokens": 3,
            },
        ),
    }
    assert requests == expected
    notes = [event["name"] for event in events if event["ph"] == "i"]
    assert notes == ["session created", "client finished: success"]


def test_a_link_to_a_trace_is_made_for_who_may_see_the_session(server: Served, session_id: str) -> None:
    path = f"/api/v1/sessions/{session_id}/trace_export"
    assert server.bob.get(path).status_code == 404
    server.alice.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": SHARED_PROJECT})
    url = server.bob.get(path).json()["url"]
    assert server.anyone.get(url).status_code == 200
    assert server.anyone.get(url.replace("signature=", "signature=0")).status_code == 404
    assert server.anyone.get(url.replace("expires=", "expires=9")).status_code == 404
    assert server.anyone.get(f"/api/v1/traces/{session_id}").status_code == 400
