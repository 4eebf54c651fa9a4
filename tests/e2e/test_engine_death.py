"""The engine dies; the API stays up, says what was lost, and the next run works."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, Launch, LiveServer, tiny_config
from tests.e2e.test_sdk_loop import TOKENS, datum


@pytest.fixture
def server(launch: Launch, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> LiveServer:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return launch(config=tiny_config(tiny_model))


def engine_pid(server: LiveServer) -> int:
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=True
    )
    (pid,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "tuft.engine.process" in line]
    return pid


def test_a_killed_engine_loses_live_runs_but_neither_api_nor_checkpoints(server: LiveServer) -> None:
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    training.forward_backward([datum()], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    path = training.save_state("safe").result().path
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TOKENS)
    before = sampler.compute_logprobs(prompt).result()

    os.kill(engine_pid(server), signal.SIGKILL)
    assert httpx.get(f"{server.url}/api/v1/healthz").json() == {"status": "ok"}
    with pytest.raises(tinker.RequestFailedError, match="engine"):
        training.forward_backward([datum()], "cross_entropy").result()

    # a frozen sampler comes back from disk, the run from its checkpoint, in place or as a new one
    assert sampler.compute_logprobs(prompt).result() == before
    training.load_state_with_optimizer(path).result()
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    losses = [run.forward_backward([datum()], "cross_entropy").result().metrics for run in (training, resumed)]
    assert losses[0] == losses[1]


def test_a_stopped_server_ends_its_engine_and_exits_zero(launch: Launch, tiny_model: Path) -> None:
    server = launch(config=tiny_config(tiny_model))
    pid = engine_pid(server)
    assert server.stop() == 0
    assert not Path(f"/proc/{pid}").exists()


def test_work_that_was_queued_ends_before_the_server_does(
    launch: Launch, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    server = launch(config=tiny_config(tiny_model))
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    run_id = training.get_info().model_id
    waiting = [training.forward_backward([datum()] * 50, "cross_entropy") for _ in range(5)]
    saved = training.save_state("last-words")
    waiting[0].result()
    assert server.stop() == 0
    assert list(server.home.glob(f"checkpoints/*/{run_id}/last-words-*/manifest.json"))
    del saved
