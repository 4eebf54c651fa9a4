"""No answer carries a key that it was not sent, or a path of the server's machine; no log a key, a prompt or a path."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from tests.api.calls import cross_entropy, post, settled
from tests.conftest import TINY_MODEL, Launch, LiveServer, tiny_config

PROMPT_TOKEN, OUTSIDE = 377, 99_999
STOP = "a-private-stop-string"


@pytest.fixture
def server(launch: Launch, tiny_model: Path) -> LiveServer:
    """Logs as much as it can."""
    return launch(config=tiny_config(tiny_model))


def test_what_goes_wrong_tells_neither_clients_nor_the_log_what_is_secret(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=60) as client:
        told = list(provoked(client, server))
    assert len(told) > 12
    for text in told:
        for secret in (server.key, str(server.home), str(server.home.parent)):
            assert secret not in text, text
    log = server.log.read_text().split("ready after", 1)[-1]
    assert "operation failed" in log or "failed" in log
    for secret in (server.key, "tml-wrong", STOP, str(OUTSIDE), str(server.home), "Traceback", "site-packages"):
        assert secret not in log, log[max(0, log.index(secret) - 500) :][:1000]


def provoked(client: httpx.Client, server: LiveServer) -> list[str]:
    """What the server answers to all sorts of wrong requests, its disk being damaged on the way."""
    session_id = post(client, "create_session", tags=[]).json()["session_id"]
    of_session = {"session_id": session_id, "base_model": TINY_MODEL}
    made = settled(client, post(client, "create_model", **of_session, model_seq_id=0).json()["request_id"]).json()
    run_id, seq_id, texts = made["model_id"], 0, []
    sampler = {**of_session, "sampling_session_seq_id": 0}
    sampler_id = post(client, "create_sampling_session", **sampler).json()["sampling_session_id"]

    def operation(route: str, **fields: object) -> str:
        nonlocal seq_id
        seq_id += 1
        submitted = post(client, route, model_id=run_id, seq_id=seq_id, **fields)
        return ended(submitted)

    def ended(submitted: httpx.Response) -> str:
        if submitted.status_code != 200 or "request_id" not in submitted.json():
            return submitted.text
        return settled(client, submitted.json()["request_id"]).text

    bad = cross_entropy([PROMPT_TOKEN, OUTSIDE, PROMPT_TOKEN])
    texts += [operation("forward", forward_input=bad), operation("forward", forward_input={"data": STOP})]
    sample = {"sampling_session_id": sampler_id, "prompt": {"chunks": [{"tokens": [PROMPT_TOKEN]}]}, "num_samples": 1}
    texts.append(post(client, "asample", seq_id=0, **sample, sampling_params={"stop": STOP * 100}).text)
    texts.append(operation("save_weights", path="/etc/passwd"))
    texts.append(client.post("/api/v1/asample", content=b'{"prompt": "' + STOP.encode()).text)
    texts.append(client.get(f"/api/v1/download/{run_id}/weights/x/y?expires=1&signature=abc").text)
    texts.append(httpx.get(f"{server.url}/api/v1/sessions", headers={"X-API-Key": "tml-wrong-key"}).text)
    texts.append(client.get("/api/v1/nothing").text)
    texts.append(client.get("/api/v1/training_runs?limit=x").text)
    texts.append(post(client, "weights_info", tinker_path=f"tinker://{run_id}/weights/none").text)
    texts.append(post(client, "create_model", session_id=session_id, model_seq_id=3, base_model="/etc/passwd").text)

    texts.append(operation("save_weights", path="saved"))
    for file in (server.home / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    texts.append(operation("load_weights", path=f"tinker://{run_id}/weights/saved", optimizer=True))
    shutil.rmtree(server.home / "checkpoints")
    (server.home / "checkpoints").write_text("no directory any more")
    texts.append(operation("load_weights", path=f"tinker://{run_id}/weights/saved", optimizer=True))
    texts.append(operation("save_weights", path="after"))
    assert any("checkpoint" in text or "disk" in text for text in texts[-3:])
    return texts
