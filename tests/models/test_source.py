"""Finding a base model: local paths, and a hub that cannot help."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.models.tiny import make_tiny_model
from tuft.errors import ModelError
from tuft.models.load import load_weights
from tuft.models.source import resolve_source

COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_a_directory_and_a_gguf_file_are_found_where_they_are(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path / "model")
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert resolve_source(str(directory)) == directory
    assert resolve_source(str(gguf)) == gguf


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c", "model.gguf"])
def test_a_local_path_that_does_not_exist_is_no_hub_id(path: str) -> None:
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve_source(path)


def test_a_path_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_source(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_source(str(weights))


class _LocalHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download of one small model needs."""

    directory: Path  # set by subclassing

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = {file.name: file.read_bytes() for file in self.directory.iterdir()}
        name = path.rpartition("/")[2]
        if path == "/api/models/some/model/revision/main":
            siblings = [{"rfilename": name} for name in files]
            return self._answer(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode())
        if path.startswith("/api/models/some/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files.items()
            ]
            return self._answer(200, json.dumps(tree).encode())
        if path == f"/some/model/resolve/{COMMIT}/{name}" and name in files:
            return self._answer(200, files[name])
        return self._answer(404, b"", "RepoNotFound")

    def _answer(self, status: int, body: bytes, error_code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error_code is not None:
            self.send_header("X-Error-Code", error_code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A hub on this machine that holds one model, some/model."""
    directory = make_tiny_model("llama", tmp_path / "published")
    (directory / "consolidated.safetensors").touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_LocalHub,), {"directory": directory})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def resolve_with_hub(endpoint: str, hub_id: str, home: Path) -> str:
    """What is found or said, in a process of its own, since huggingface_hub reads its environment at import."""
    program = (
        "import sys; from tuft.models.source import resolve_source; from tuft.errors import ModelError\n"
        "try: print(resolve_source(sys.argv[1]))\n"
        "except ModelError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, hub_id], env=environment, capture_output=True, text=True, check=True
    )
    return finished.stdout.strip()


def test_a_hub_id_becomes_a_directory_that_loads_also_when_the_hub_is_gone(hub: str, tmp_path: Path) -> None:
    snapshot = resolve_with_hub(hub, "some/model", tmp_path / "home")
    found = {file.name for file in Path(snapshot).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= found
    assert "consolidated.safetensors" not in found
    assert load_weights(snapshot).config.architecture == "LlamaForCausalLM"
    assert resolve_with_hub("http://127.0.0.1:9", "some/model", tmp_path / "home") == snapshot


def test_a_model_that_the_hub_does_not_have_is_named(hub: str, tmp_path: Path) -> None:
    message = resolve_with_hub(hub, "another/model", tmp_path / "home")
    assert message.startswith("another/model: neither a local directory nor a model on the hub")


def test_an_unreachable_hub_says_how_to_do_without(tmp_path: Path) -> None:
    message = resolve_with_hub("http://127.0.0.1:9", "some/model", tmp_path)
    assert message.startswith("some/model: cannot be fetched from the hub")
    assert "HF_ENDPOINT" in message
    assert "`path` to a local directory" in message


def test_a_name_that_is_no_hub_id_says_so(tmp_path: Path) -> None:
    message = resolve_with_hub("http://127.0.0.1:9", "some model", tmp_path)
    assert message.startswith("some model: neither a local directory nor a model on the hub")
