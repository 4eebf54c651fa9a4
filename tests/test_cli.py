from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import TINY_MODEL, TUFT, Launch, LiveServer, tiny_config
from tuft.app import ensure_first_key, open_store
from tuft.config import load_config
from tuft.service.services import open_tenants


def tuft(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TUFT, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})}
    )


def test_help_needs_no_torch_and_names_the_commands() -> None:
    code = "import sys; sys.argv = ['tuft', '--help']\nimport atexit\nfrom tuft.cli import main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "False"
    assert all(command in done.stdout for command in ("launch", "key", "config"))


def test_the_first_launch_keeps_its_key_for_the_owner_alone(tiny_server: LiveServer) -> None:
    file = tiny_server.home / "api_key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert tiny_server.key.startswith("tml-")
    log = tiny_server.log.read_text()
    assert tiny_server.key in log
    assert f'tinker.ServiceClient(base_url="{tiny_server.url}"' in log
    database = b"".join(path.read_bytes() for path in tiny_server.home.glob("tuft.sqlite3*"))
    assert tiny_server.key.encode() not in database


def test_a_second_server_on_one_home_is_refused_by_the_firsts_process_id(tiny_server: LiveServer) -> None:
    done = tuft("launch", "--port", "0", "--home", str(tiny_server.home))
    assert done.returncode == 1
    assert f"in use by another server: process {tiny_server.process.pid} " in done.stderr


def test_a_port_in_use_says_what_to_do(tiny_server: LiveServer, tmp_path: Path) -> None:
    port = tiny_server.url.rsplit(":", 1)[1]
    done = tuft("launch", "--port", port, "--home", str(tmp_path))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port 0" in done.stderr


def test_a_key_from_the_environment_and_from_the_file_open_the_door(launch: Launch, tiny_model: Path) -> None:
    keys = '[[keys]]\ntenant = "carol"\nkey = "tml-from-the-file"\n'
    server = launch(config=keys + tiny_config(tiny_model), env={"TUFT_API_KEY": "tml-from-the-environment"})
    for key in ("tml-from-the-file", "tml-from-the-environment"):
        answer = httpx.get(f"{server.url}/api/v1/get_server_capabilities", headers={"X-API-Key": key})
        assert answer.json()["supported_models"][0]["model_name"] == TINY_MODEL
    assert "tml-from-the-environment" not in server.log.read_text()


def test_a_kept_key_that_the_database_has_forgotten_is_replaced(tmp_path: Path) -> None:
    config = load_config(home=tmp_path)
    keys = []
    for _ in range(2):
        database = open_store(config)
        tenants = open_tenants(config, database)
        key, is_new = ensure_first_key(config, tenants)
        assert is_new
        assert tenants.knows(key or "")
        assert ensure_first_key(config, tenants) == (key, False)
        keys.append(key)
        database.close()
        for file in tmp_path.glob("tuft.sqlite3*"):
            file.unlink()
    assert keys[0] != keys[1]


def test_the_snippet_that_launch_prints_can_be_pasted(tiny_server: LiveServer) -> None:
    log = tiny_server.log.read_text().splitlines()
    start = log.index("import tinker")
    snippet = "\n".join(log[start : start + 3])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", snippet], capture_output=True, text=True, timeout=60)
    assert TINY_MODEL in done.stdout, done.stderr


def test_a_base_model_that_is_not_there_ends_the_launch_with_the_reason(tmp_path: Path) -> None:
    config = tmp_path / "tuft.toml"
    config.write_text(f'[[base_models]]\nname = "x/y"\npath = "{tmp_path}/nowhere"\n')
    done = tuft("launch", "--port", "0", "--home", str(tmp_path / "home"), "--config", str(config))
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port = 1", "port: unknown option"),
        ('[server]\nport = "x"', "server.port: got 'x'"),
        ("[server]\nport = 99999", "server.port: got 99999"),
        ('[[base_models]]\nname = "a"\nprecision = "fp8"', "base_models.0.precision: got 'fp8'"),
        ('[[base_models]]\nname = "a"\n[[base_models]]\nname = "a"', "the name 'a' is used twice"),
        ('[[keys]]\ntenant = "a"\nkey = "secret-without-prefix"', "must start with 'tml-'"),
        ("[server", "not valid TOML"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_explained(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "tuft.toml"
    config.write_text(content)
    done = tuft("config", "--check", "--config", str(config))
    assert done.returncode == 1
    assert message in done.stderr
    assert "secret-without-prefix" not in done.stderr


def test_the_environment_overrides_the_file_and_options_override_both(tmp_path: Path) -> None:
    config = tmp_path / "tuft.toml"
    config.write_text("[server]\nport = 1\n[limits]\nmax_rank = 7\n")
    shown = tuft("config", "--show", "--config", str(config), env={"TUFT_SERVER__PORT": "2"}).stdout
    assert "port = 2" in shown
    assert "max_rank = 7" in shown
    home = tuft("config", "--show", "--home", "/tmp/elsewhere", env={"TUFT_HOME": "/tmp/here"}).stdout
    assert 'home = "/tmp/elsewhere"' in home


def test_a_home_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = tuft("key", "create", "--tenant", "a", "--home", str(tmp_path / "file" / "home"))
    assert done.returncode == 1
    assert "cannot be used" in done.stderr


def test_a_tenants_name_is_checked(tmp_path: Path) -> None:
    done = tuft("key", "create", "--tenant", "../x", "--home", str(tmp_path))
    assert done.returncode == 1
    assert "tenant: got '../x'" in done.stderr


@pytest.mark.slow
def test_the_embedded_model_is_served_by_default(embedded_server: LiveServer) -> None:
    answer = httpx.get(f"{embedded_server.url}/readyz")
    assert answer.json()["base_models"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


@pytest.mark.parametrize("url", ["postgresql://tuft:hidden@127.0.0.1:1/tuft", "mysql://tuft:hidden@127.0.0.1:1/tuft"])
def test_the_databases_password_is_shown_nowhere(tmp_path: Path, url: str) -> None:
    home, env = str(tmp_path), {"TUFT_DATABASE_URL": url}
    shown = tuft("config", "--show", "--home", home, env=env)
    assert shown.returncode == 0
    refused = tuft("key", "create", "--tenant", "alice", "--home", home, env=env)
    assert refused.returncode == 1
    assert "database" in refused.stderr
    for done in (shown, refused):
        assert "hidden" not in done.stdout + done.stderr
