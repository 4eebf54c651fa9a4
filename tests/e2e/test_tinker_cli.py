"""The SDK's own ``tinker`` command against a real server: signing in and out, models, usage, traces."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tinker
from click.testing import CliRunner, Result
from tinker.cli.__main__ import main_cli
from tinker.lib.credentials import GeneratedKey, JsonCredentialStore, default_credentials_path

from tests.conftest import TINY_MODEL, LiveServer
from tuft.records import now

Command = Callable[..., Result]


@pytest.fixture
def command(tiny_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``command("auth", "login")``: the command line in this process, in a home of its own, with no key but the one
    that it keeps there."""
    for name, value in (("HOME", str(tmp_path)), ("TINKER_BASE_URL", tiny_server.url), ("TINKER_TELEMETRY", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *words, **options: CliRunner().invoke(main_cli, words, **options)


@pytest.fixture
def signed_in(command: Command, tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("TINKER_API_KEY", tiny_server.key)
    return command


def shown(result: Result) -> Any:
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.calls("GET /api/v1/auth/apikey/me")
def test_a_pasted_key_is_checked_kept_and_given_up_again(command: Command, tiny_server: LiveServer) -> None:
    login = command("auth", "login", input=f"{tiny_server.key}\n")
    assert "Logged in as default (tuft). Stored API key 'default …" in login.output, login.exception
    assert "Tinker accessible: yes" in command("auth", "status").output
    assert shown(command("--format", "json", "auth", "whoami")) == {
        "user_urn": "urn:tuft:tenant:default",
        "org_urn": "tml:organization:tuft",
        "email": None,
    }
    assert "The API key is still active." in command("auth", "logout").output
    assert "Credentials available: no" in command("auth", "status").output


def test_a_command_that_prints_the_key_does_as_well(
    command: Command, tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"echo {tiny_server.key}")
    assert shown(command("--format", "json", "auth", "whoami"))["user_urn"] == "urn:tuft:tenant:default"


def test_a_wrong_key_is_not_kept(command: Command) -> None:
    login = command("auth", "login", input="tml-wrong\n")
    assert login.exit_code != 0
    assert "invalid api key" in str(getattr(login.exception, "details", ""))
    assert not default_credentials_path().exists()


@pytest.mark.calls("DELETE /api/v1/auth/apikey/me")
def test_signing_out_of_a_key_that_the_command_line_made_ends_the_key(
    command: Command, tiny_server: LiveServer
) -> None:
    key = tiny_server.create_key("alice")
    command("auth", "login", input=f"{key}\n")
    store = JsonCredentialStore(default_credentials_path())
    key_id, record = store.get_default_key_id(), store.get_default_key()
    assert key_id is not None
    assert record is not None
    assert record.details is not None
    store.add_key(key_id, GeneratedKey(key=record.key, name=record.name, details=record.details))
    assert "deleted its API key on the server" in command("auth", "logout").output
    with pytest.raises(tinker.AuthenticationError, match="invalid api key"):
        tinker.RestClient(base_url=tiny_server.url, api_key=key)


def test_the_models_are_listed_and_found_by_a_part_of_their_name(signed_in: Command) -> None:
    models = shown(signed_in("--format", "json", "model", "list", "QWEN"))["models"]
    assert [(model["model_name"], model["max_context_length"], model["trainable"]) for model in models] == [
        (TINY_MODEL, 512, True)
    ]
    missing = signed_in("model", "list", "llama")
    assert "for organization tml:organization:tuft" in str(missing.exception)


def test_usage_and_storage_are_shown(signed_in: Command) -> None:
    hour = now().replace(minute=0, second=0, microsecond=0)
    window = [(hour + timedelta(hours=hours)).isoformat() for hours in (-1, 1)]
    usage = shown(signed_in("--format", "json", "billing", "usage", *window))
    assert usage["cost_data_through"] is None
    assert {row["user_name"] for row in usage["data"]} <= {"default"}
    stored = shown(signed_in("--format", "json", "billing", "checkpoint-storage", "--project-id", "default"))
    assert stored["effective_rate_usd_per_gigabyte_month"] is None


def test_a_trace_is_saved_as_a_file(signed_in: Command, tiny_server: LiveServer, tmp_path: Path) -> None:
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    session_id = client.holder.get_session_id()
    client.close("success").result()
    result = signed_in("session", "export-trace", session_id)
    assert result.exit_code == 0, (result.output, result.exception)
    trace = json.loads((tmp_path / f"{session_id}.pftrace").read_text())
    assert trace["otherData"]["session_id"] == session_id


def test_the_command_itself_says_that_all_is_well(signed_in: Command) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("tinker"), "auth", "status"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["Credentials available: yes", "Tinker accessible: yes"], done.stderr
