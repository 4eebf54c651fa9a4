"""The demo, the script and the notebook against a real server with the embedded model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import peft
import pytest

from tests.conftest import with_kernels

REPOSITORY = Path(__file__).parents[2]
CHAT_SFT = REPOSITORY / "examples" / "chat_sft"
DEMO = [sys.executable, str(CHAT_SFT / "demo.py")]
SMALL = ["--batch-size", "2", "--num-test", "3", "--answer-tokens", "8", "--eval-every", "2"]
API_KEY = "tml-of-the-notebook-test"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def metrics(out: Path) -> list[dict[str, float | None]]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def server_answers(demo_output: str) -> bool:
    port = re.search(r"http://127\.0\.0\.1:(\d+)", demo_output)
    assert port is not None
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port[1]))) == 0


def test_the_demo_trains_asks_saves_and_leaves_nothing_running(tmp_path: Path, kernels: Path) -> None:
    with_kernels(tmp_path / "home", kernels)
    finished = subprocess.run(
        [*DEMO, "--epochs", "0.024", *SMALL, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not server_answers(finished.stdout)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["test_nll"] is not None for row in rows] == [True, False, True, False, True]
    assert rows[0]["train_nll"] is None
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "answers.md").read_text().count("**After**") == 3
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").r == 8
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 1_000_000
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["checkpoints"]["sampler"].startswith("tinker://")
    assert "api_key" not in run["settings"]


def test_ctrl_c_saves_what_was_trained_and_stops_the_server(tmp_path: Path, kernels: Path) -> None:
    with_kernels(tmp_path / "home", kernels)
    with subprocess.Popen(
        [*DEMO, "--steps", "500", *SMALL, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as demo:
        while len(metrics(tmp_path)) < 2 and demo.poll() is None:
            time.sleep(0.2)
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: everyone in the group gets it
        output, _ = demo.communicate()

    assert demo.returncode == 130, output
    assert not server_answers(output)
    steps = [row["step"] for row in metrics(tmp_path)]
    assert steps == list(range(len(steps)))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["last_step"]["step"] == steps[-1] >= 1
    assert run["checkpoints"]["state"] in output


def test_a_wrong_key_or_url_is_one_clean_line_and_exit_code_1(server: str, tmp_path: Path) -> None:
    script = [sys.executable, str(CHAT_SFT / "chat_sft.py"), "--out", str(tmp_path)]

    refused = subprocess.run(
        [*script, "--base-url", server, "--api-key", "tml-wrong"], capture_output=True, text=True, check=False
    )
    nowhere = subprocess.run(
        [*script, "--base-url", "http://127.0.0.1:9", "--api-key", API_KEY], capture_output=True, text=True, check=False
    )

    assert (refused.returncode, nowhere.returncode) == (1, 1)
    assert "error: " in refused.stderr
    assert "error: no server at http://127.0.0.1:9" in nowhere.stderr
    assert "Traceback" not in refused.stderr + nowhere.stderr


def test_the_notebook_runs_from_top_to_bottom(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name, value in {
        "TINKER_BASE_URL": server,
        "TINKER_API_KEY": API_KEY,
        "CHAT_SFT_STEPS": "2",
        "CHAT_SFT_OUT": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(CHAT_SFT / "chat_sft.ipynb", as_version=4)

    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(CHAT_SFT)}}).execute()

    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2]
    assert (tmp_path / "answers.md").is_file()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> Iterator[str]:
    from demo import running_server

    with running_server(with_kernels(tmp_path_factory.mktemp("home"), kernels), API_KEY) as base_url:
        yield base_url
