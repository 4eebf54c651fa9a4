"""No request makes the server call out: not a name of the hub, not a URL where a path is wanted, not an age recipient.

The server runs as it is installed. Python imports ``sitecustomize`` from the ``PYTHONPATH`` first, in the server and in
every process that it starts: there an audit hook writes down each attempt to reach another machine, and stops it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.api.calls import TOKENS, cross_entropy, post, result
from tests.api.fuzzing import RECIPIENT, REQUESTS
from tests.conftest import TINY_MODEL, Launch, LiveServer, tiny_config

GUARD = """
import os, sys

_LOG = os.environ["TUFT_TEST_OUTBOUND_LOG"]
_NEAR = ("127.", "::1", "localhost", "0.0.0.0")


def _watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1] if len(arguments) > 1 else None
        host = address[0] if isinstance(address, tuple) else None  # a Unix socket is no other machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event == "urllib.Request":
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if not host or str(host).startswith(_NEAR):
        return
    with open(_LOG, "a") as file:
        file.write(f"{event} {host}\\n")
    raise PermissionError(f"the test lets nobody reach {host}")


sys.addaudithook(_watch)
"""
ELSEWHERE = "outside.invalid"


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that is watched."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    return {"PYTHONPATH": str(folder), "TUFT_TEST_OUTBOUND_LOG": str(folder / "log"), "HF_HOME": str(folder / "hf")}


def attempts(guard: dict[str, str]) -> list[str]:
    log = Path(guard["TUFT_TEST_OUTBOUND_LOG"])
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture(scope="module")
def watched(launch: Launch, tiny_model: Path, guard: dict[str, str]) -> LiveServer:
    return launch(config=tiny_config(tiny_model), env=guard)


def test_the_guard_sees_who_calls_out(guard: dict[str, str], tmp_path: Path) -> None:
    own = {**guard, "TUFT_TEST_OUTBOUND_LOG": str(tmp_path / "log")}
    for code in (
        f"import urllib.request; urllib.request.urlopen('http://{ELSEWHERE}/x')",
        f"import socket; socket.create_connection(('{ELSEWHERE}', 443))",
        "import socket; socket.socket().connect(('192.0.2.1', 443))",
        f"import httpx; httpx.get('https://{ELSEWHERE}/a/b/resolve/main/config.json')",  # as the hub's client asks
    ):
        before = len(attempts(own))
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, check=False)
        assert done.returncode != 0
        assert len(attempts(own)) > before, code


def test_the_guard_is_in_the_server_and_in_its_engine(watched: LiveServer) -> None:
    for process in (watched.process.pid, *children(watched.process.pid)):
        environment = Path(f"/proc/{process}/environ").read_bytes().decode()
        assert "TUFT_TEST_OUTBOUND_LOG=" in environment
    assert len(children(watched.process.pid)) >= 1


def children(pid: int) -> list[int]:
    found = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [int(child) for child in found]


def test_no_request_makes_the_server_call_out(watched: LiveServer, guard: dict[str, str]) -> None:
    url = f"http://{ELSEWHERE}/model"
    with httpx.Client(base_url=watched.url, headers={"X-API-Key": watched.key}, timeout=60) as client:
        session_id = post(client, "create_session", tags=[url], project_id=url, display_name=url).json()["session_id"]
        everyday(client, session_id)
        for name in (
            "meta-llama/Llama-3.2-1B",
            "gpt2",
            url,
            f"{ELSEWHERE}/a/b",
            f"hf://{ELSEWHERE}/b",
            f"//{ELSEWHERE}/x",
        ):
            for route, fields in (
                ("create_model", {"session_id": session_id, "model_seq_id": 7, "base_model": name}),
                (
                    "create_sampling_session",
                    {"session_id": session_id, "sampling_session_seq_id": 7, "base_model": name},
                ),
                (
                    "create_sampling_session",
                    {"session_id": session_id, "sampling_session_seq_id": 7, "model_path": name},
                ),
                ("load_weights", {"session_id": session_id, "model_seq_id": 7, "path": name}),
                ("weights_info", {"tinker_path": name}),
                ("copy_weights", {"source_path": name, "destination_project_id": "p"}),
            ):
                assert post(client, route, **fields).status_code in (400, 404), (route, name)
            for route in (f"/{name}/resolve/main/config.json", f"/api/models/{name}", f"/api/models/{name}/tree/main"):
                assert client.get(watched.url + route).status_code in (400, 404)
        forged = {
            "X-Forwarded-Host": ELSEWHERE,
            "X-Forwarded-Proto": "http",
            "Host": ELSEWHERE,
            "Origin": url,
            "Referer": url,
        }
        assert client.get("/readyz", headers=forged).status_code == 200
        assert post(client, "auth/token").status_code == 200
        token = "eyJhbGciOiJSUzI1NiIsImprdSI6Imh0dHA6Ly9vdXRzaWRlLmludmFsaWQvaiJ9.e30.AA"  # asks for keys from a "jku"
        assert client.get("/api/v1/sessions", headers={"X-API-Key": token}).status_code == 401
    assert attempts(guard) == []


def everyday(client: httpx.Client, session_id: str) -> None:
    """What every client does, with all that is written encrypted to age recipients and links to be downloaded."""
    created = post(client, "create_model", session_id=session_id, model_seq_id=0, base_model=TINY_MODEL)
    run_id = result(client, created)["model_id"]
    on_run = {"model_id": run_id}
    result(client, post(client, "forward_backward", **on_run, seq_id=1, forward_backward_input=cross_entropy(TOKENS)))
    result(client, post(client, "optim_step", **on_run, seq_id=2, adam_params={}))
    saved = result(client, post(client, "save_weights", **on_run, seq_id=3, path="x"))
    result(client, post(client, "load_weights", **on_run, seq_id=4, path=saved["path"], optimizer=True))
    for seq_id, recipients in enumerate(
        ([RECIPIENT], [f"http://{ELSEWHERE}/key"], ["github:someone"], [f"age1{ELSEWHERE}"]), start=5
    ):
        external = {"path": f"e{seq_id}", "age_encryption_recipients": recipients}
        failed = "error" in result(client, post(client, "save_weights_external", **on_run, seq_id=seq_id, **external))
        assert failed == (recipients != [RECIPIENT])
    loss = {**REQUESTS["create_custom_loss"], "session_id": session_id, "custom_loss_seq_id": 0}
    result(client, post(client, "create_custom_loss", **loss))
    sampled = {"sampling_params": {"max_tokens": 2}, "prompt": {"chunks": [{"tokens": TOKENS}]}}
    for weights in ({"base_model": TINY_MODEL}, {"model_path": saved["path"]}):
        result(client, post(client, "asample", **weights, **sampled))
    client.get(
        f"/api/v1/training_runs/{run_id}/checkpoints/weights/x/archive", follow_redirects=True
    ).raise_for_status()
    client.get(f"/{TINY_MODEL}/resolve/main/tokenizer.json").raise_for_status()
