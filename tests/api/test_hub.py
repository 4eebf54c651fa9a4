"""The server as a hub: the real clients load the tokenizer from it, and nothing else is to be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.api.calls import ALIAS, BASE_MODEL
from tests.api.conftest import Served

TEXT = "Four score 1234"
LOAD = f"""
import sys
from transformers import AutoTokenizer
for name in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(name, fast=True)
    print(tokenizer.encode("{TEXT}"), tokenizer.eos_token_id, bool(tokenizer.chat_template))
"""


def load_tokenizers(home: Path, *names: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, *names],
        env={**clean, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_transformers_loads_the_tokenizer_from_this_server_and_later_without_it(server: Served, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.services.base_models[0].tokenizer_dir)
    expected = [f"{tokenizer.encode(TEXT)} {tokenizer.eos_token_id} {bool(tokenizer.chat_template)}"]
    loaded = load_tokenizers(tmp_path / "hf", BASE_MODEL, ALIAS, HF_ENDPOINT=server.url)
    assert loaded == expected * 2
    assert load_tokenizers(tmp_path / "hf", BASE_MODEL, HF_HUB_OFFLINE="1") == expected


def test_a_file_has_what_the_hubs_client_needs(server: Served) -> None:
    for method in ("GET", "HEAD"):
        response = server.anyone.request(method, f"/{BASE_MODEL}/resolve/main/tokenizer.json")
        content = Path(server.services.base_models[0].tokenizer_dir, "tokenizer.json").read_bytes()
        assert response.status_code == 200
        assert response.headers["content-length"] == str(len(content))
        assert response.content == (content if method == "GET" else b"")
        assert response.headers["etag"].strip('"')
        commit = response.headers["x-repo-commit"]
        assert len(commit) == 40
        assert server.anyone.head(f"/{BASE_MODEL}/resolve/{commit}/tokenizer.json").status_code == 200


def test_the_listing_is_of_the_tokenizer_alone(server: Served) -> None:
    files = {entry["path"] for entry in server.anyone.get(f"/api/models/{BASE_MODEL}/tree/main").json()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= files
    assert all(file.endswith((".json", ".txt", ".jinja", ".model")) for file in files)
    for route in (f"/api/models/{ALIAS}", f"/api/models/{ALIAS}/revision/main"):
        described = server.anyone.get(route).json()
        assert {sibling["rfilename"] for sibling in described["siblings"]} == files


@pytest.fixture
def secrets(server: Served) -> list[Path]:
    """Files beside and above the tokenizer's own."""
    folder = Path(server.services.base_models[0].tokenizer_dir)
    files = [folder / "model.safetensors", folder.parent / "config.json", folder / "config.json.bak"]
    for file in files:
        file.write_text("secret")
    return files


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json.bak",
        "../config.json",
        "..%2fconfig.json",
        "%2e%2e/config.json",
        "..%5cconfig.json",
        "%2fetc%2fpasswd",
        "config.json%00.bak",
        ".",
        "",
    ],
)
def test_no_other_file_can_be_had(server: Served, secrets: list[Path], file: str) -> None:
    response = server.anyone.get(f"/{BASE_MODEL}/resolve/main/{file}")
    assert response.status_code == 404
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("route", "code"),
    [
        (f"/{BASE_MODEL}/resolve/main/added_tokens.json", "EntryNotFound"),
        ("/no/such/resolve/main/config.json", "RepoNotFound"),
        ("/..%2f..%2fetc/resolve/main/config.json", "RepoNotFound"),
        (f"/{BASE_MODEL}/resolve/v2/config.json", "RevisionNotFound"),
        (f"/api/models/{BASE_MODEL}/tree/main/additional_chat_templates", "EntryNotFound"),
        ("/api/models/no/such", "RepoNotFound"),
    ],
)
def test_what_is_missing_is_said_in_the_hubs_words(server: Served, route: str, code: str) -> None:
    response = server.anyone.get(route)
    assert response.status_code == 404
    assert response.headers["x-error-code"] == code
    assert response.json()["detail"]
