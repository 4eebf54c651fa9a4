"""The SDK's own ``tinker`` command against a real server: runs and checkpoints."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tinker
from click.testing import CliRunner, Result
from tinker.cli.__main__ import main_cli

from tests.conftest import TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import datum, step

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def run_id(tiny_server: LiveServer) -> str:
    """A trained run with a checkpoint of each kind, all named x."""
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4, user_metadata={"purpose": "cli"}).result()
    step(training, [datum()])
    for save in (training.save_state, training.save_weights_for_sampler, training.save_weights_external):
        save("x").result()
    return training.get_info().model_id


@pytest.fixture
def command(tiny_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``command("run", "list")``: the command line in this process, in a directory of its own. It keeps its client for
    the next test of this process, which must therefore use the same key."""
    settings = {"HOME": str(tmp_path), "TINKER_BASE_URL": tiny_server.url, "TINKER_API_KEY": tiny_server.key}
    for name, value in {**settings, "TINKER_TELEMETRY": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main_cli, words)


def done(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception, getattr(result.exception, "details", None))
    return result.output


def shown(command: Command, *words: str) -> Any:
    return json.loads(done(command("--format", "json", *words)))


def test_runs_are_listed_and_shown(command: Command, run_id: str) -> None:
    (run,) = [run for run in shown(command, "run", "list", "--limit", "0")["runs"] if run["training_run_id"] == run_id]
    assert run == shown(command, "run", "info", run_id)
    assert (run["training_run_id"], run["base_model"], run["lora_rank"]) == (run_id, TINY_MODEL, 4)
    table = done(command("run", "list", "--columns", "id,owner,status,checkpoint"))
    assert all(cell in table for cell in (" training run", "default", "OK", "weights/x"))
    info = done(command("run", "info", run_id))
    assert "sampler_weights/x" in info
    assert "purpose" in info


def test_checkpoints_are_listed_and_shown(command: Command, run_id: str) -> None:
    listed = shown(command, "checkpoint", "list", "--run-id", run_id)["checkpoints"]
    assert {checkpoint["checkpoint_type"] for checkpoint in listed} >= {"training", "sampler", "external"}
    mine = shown(command, "checkpoint", "list", "--limit", "0")["checkpoints"]
    assert {checkpoint["tinker_path"] for checkpoint in mine} >= {checkpoint["tinker_path"] for checkpoint in listed}
    for segment in ("weights", "sampler_weights", "external_weights"):
        info = shown(command, "checkpoint", "info", f"tinker://{run_id}/{segment}/x")
        assert (info["checkpoint_id"], info["lora_rank"], info["public"]) == (f"{segment}/x", 4, False)
        assert info["size_bytes"] > 10_000


def test_a_checkpoint_is_published_and_given_a_time(command: Command, run_id: str) -> None:
    path = f"tinker://{run_id}/weights/x"
    for words, public, expires in (
        (("publish", path), True, False),
        (("set-ttl", path, "--ttl", "7200"), True, True),
        (("set-ttl", path, "--remove"), True, False),
        (("unpublish", path), False, False),
    ):
        done(command("checkpoint", *words))
        info = shown(command, "checkpoint", "info", path)
        assert (info["public"], info["expires_at"] is not None) == (public, expires), words
    refused = command("checkpoint", "set-ttl", path, "--ttl", "60")
    assert "ttl_seconds: got 60; must be 3600 to" in str(getattr(refused.exception, "details", ""))


def test_checkpoints_are_downloaded_whole(command: Command, run_id: str, tmp_path: Path) -> None:
    """A training checkpoint by way of an export that the command makes and takes away again."""
    folders = []
    for segment in ("weights", "external_weights"):
        output = shown(command, "checkpoint", "download", f"tinker://{run_id}/{segment}/x", "--output", "here")
        folders.append(tmp_path / "here" / f"{run_id}_{segment}_x")
        assert Path(output["destination"]) == folders[-1].relative_to(tmp_path)
        assert output["file_size_bytes"] == sum(file.stat().st_size for file in folders[-1].iterdir())
    names = {"adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"}
    assert [{file.name for file in folder.iterdir()} for folder in folders] == [names, names]
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in folders}) == 1
    left = [
        checkpoint["checkpoint_id"]
        for checkpoint in shown(command, "checkpoint", "list", "--limit", "0")["checkpoints"]
    ]
    assert "external_weights/x" in left
    assert "external_weights/download" not in left


def test_checkpoints_are_deleted(command: Command, run_id: str, tiny_server: LiveServer) -> None:
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    training = client.create_training_client_from_state(f"tinker://{run_id}/weights/x").result()
    paths = [training.save_state(name).result().path for name in ("a", "b")]
    training.save_weights_for_sampler("c").result()
    assert shown(command, "checkpoint", "delete", "--yes", *paths) == {"deleted_count": 2, "failed": []}
    again = shown(command, "checkpoint", "delete", "--yes", paths[0])
    assert (again["deleted_count"], "no checkpoint" in again["failed"][0]["error"]) == (0, True)
    other_run = training.get_info().model_id
    assert "Deleted 1 checkpoint" in done(command("checkpoint", "delete", "--yes", "--run-id", other_run))
    assert shown(command, "checkpoint", "list", "--run-id", other_run)["checkpoints"] == []


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as takes small files: it keeps what is committed in ``commits``."""

    commits: list[dict[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/x/commit/1", "commitOid": "1", "success": True}
            )
        else:
            self._answer({"url": f"http://{self.headers['Host']}/me/x"})

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "orgs": []})

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.commits = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_checkpoint_is_pushed_to_a_hub_by_the_command_itself(
    command: Command, run_id: str, hub: str, tmp_path: Path
) -> None:
    """In a process of its own: the hub's address is read when its library is loaded."""
    path = f"tinker://{run_id}/external_weights/x"
    pushed = subprocess.run(
        [Path(sys.executable).with_name("tinker"), "-f", "json", "checkpoint", "push-hf", path, "--repo", "me/x"],
        env={**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_anything", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["repo_id"] == "me/x"
    (files,) = Hub.commits
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == TINY_MODEL
    card = files["README.md"].decode()
    assert f"base_model: {TINY_MODEL}" in card
    assert path in card
    assert "LoRA rank: 4" in card
