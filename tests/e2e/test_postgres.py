"""A server whose database is PostgreSQL, under the official SDK."""

from __future__ import annotations

import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests import postgres
from tests.conftest import TINY_MODEL, TUFT, Launch, LiveServer, tiny_config
from tests.e2e.test_sdk_loop import TOKENS, datum, step
from tuft.store.db import open_database


@pytest.fixture
def config(own_postgres_url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return tiny_config(tiny_model, f'database_url = "{own_postgres_url}"\n')


@pytest.fixture
def server(launch: Launch, config: str) -> LiveServer:
    return launch(config=config)


def connect(server: LiveServer) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.url, api_key=server.key)


def test_training_goes_on_through_restarts_of_the_database_and_of_the_server(
    server: LiveServer, launch: Launch, config: str, own_postgres: postgres.Postgres
) -> None:
    training = connect(server).create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()
    first = step(training, [datum()])
    own_postgres.stop("immediate")
    own_postgres.start()
    second = step(training, [datum()])
    assert second < first
    path = training.save_state("kept").result().path
    prompt = types.ModelInput.from_ints(TOKENS)
    weights = training.save_weights_for_sampler("kept").result().path
    sampler = training.create_sampling_client(weights)
    params = types.SamplingParams(max_tokens=4, seed=1, temperature=1.0)
    sampled = sampler.sample(prompt, 2, params).result()
    assert server.stop() == 0
    assert not (server.home / "tuft.sqlite3").exists()

    again = launch(home=server.home, config=config)
    assert again.key == server.key
    client = connect(again)
    resumed = client.create_training_client_from_state_with_optimizer(path)
    assert step(resumed, [datum()]) < second
    sampler = client.create_sampling_client(model_path=weights)
    once_more = sampler.sample(prompt, 2, params).result()
    assert [sequence.tokens for sequence in once_more.sequences] == [sequence.tokens for sequence in sampled.sequences]


def test_without_its_database_a_server_says_so_and_goes_on_when_it_is_back(
    server: LiveServer, own_postgres: postgres.Postgres
) -> None:
    with httpx.Client(base_url=f"{server.url}/api/v1", headers={"X-API-Key": server.key}) as client:
        assert client.get("/training_runs").status_code == 200
        own_postgres.stop()
        try:
            refused = client.get("/training_runs")
            assert client.get("/healthz").status_code == 200
        finally:
            own_postgres.start()
        assert refused.status_code == 503
        assert refused.json() == {"detail": "the database refused: it cannot be reached; is it running?"}
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/training_runs").status_code == 200


def test_a_second_home_on_the_same_database_is_refused_and_told_of_the_first(
    server: LiveServer, config: str, tmp_path: Path
) -> None:
    (tmp_path / "tuft.toml").write_text(config)
    command = [TUFT, "launch", "--port", "0", "--home", tmp_path / "home", "--config", tmp_path / "tuft.toml"]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    for part in ("in use by another server", f"process {server.process.pid} ", f"home {server.home}"):
        assert part in second.stderr


def test_a_server_that_lost_its_database_to_another_ends_and_says_so(
    server: LiveServer, own_postgres: postgres.Postgres, own_postgres_url: str
) -> None:
    server.process.send_signal(signal.SIGSTOP)  # else it would be back first
    own_postgres.stop("immediate")
    own_postgres.start()
    other = open_database(own_postgres_url, serving="another server")
    server.process.send_signal(signal.SIGCONT)
    assert server.process.wait(timeout=60) == 1
    assert "taken over by another server" in server.log.read_text().splitlines()[-1]
    other.close()


def test_keys_are_made_beside_the_server(server: LiveServer, tmp_path: Path) -> None:
    command = [TUFT, "key", "create", "--tenant", "alice", "--home", server.home]
    config = ["--config", server.home / "tuft.toml"]
    made = subprocess.run([*command, *config], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    answer = httpx.get(f"{server.url}/api/v1/training_runs", headers={"X-API-Key": made})
    assert answer.status_code == 200


def test_each_operation_is_done_once_while_the_database_is_started_anew_again_and_again(
    server: LiveServer, own_postgres: postgres.Postgres
) -> None:
    client = connect(server)
    undisturbed = client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()
    expected = [step(undisturbed, [datum()]) for _ in range(25)]
    disturbed = client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()
    over = threading.Event()
    restarts = 0

    def restart_again_and_again() -> None:
        nonlocal restarts
        while not over.wait(0.2):
            own_postgres.stop("immediate")
            own_postgres.start()
            restarts += 1

    restarting = threading.Thread(target=restart_again_and_again)
    restarting.start()
    try:
        got = [step(disturbed, [datum()]) for _ in range(25)]
    finally:
        over.set()
        restarting.join()
    assert restarts > 1
    assert got == expected
