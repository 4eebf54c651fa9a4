"""A hundred runs on a server whose memory holds ten: each goes on where it was, and none notices."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.conftest import TINY_MODEL, Launch, LiveServer, tiny_config
from tests.e2e.test_sdk_loop import datum, step

pytestmark = pytest.mark.slow

NUM_RUNS = 100
ROOM_FOR_TEN = "[engine]\nrun_memory_gib = 0.0024\n[limits]\nmax_runs_per_tenant = 100\n"  # of rank 4


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    running = launch(home=tmp_path_factory.mktemp("room"), config=tiny_config(tiny_model, ROOM_FOR_TEN))
    yield running
    running.stop()


def test_a_hundred_runs_train_where_ten_fit(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    order = random.Random(0)
    rounds: list[list[float]] = []
    runs = [client.create_lora_training_client(TINY_MODEL, rank=4, seed=3) for _ in range(NUM_RUNS)]
    for _ in range(3):
        rounds.append([step(run, [datum()]) for run in order.sample(runs, NUM_RUNS)])
    assert num_snapshots(server) >= NUM_RUNS - 10, "the others can only be on the disk"
    for nlls in rounds:
        assert len(set(nlls)) == 1, "alike begun and alike trained, they are the same to the bit"
    assert rounds[0][0] > rounds[1][0] > rounds[2][0]


def num_snapshots(server: LiveServer) -> int:
    with sqlite3.connect(server.home / "tuft.sqlite3") as database:
        return int(database.execute("SELECT count(*) FROM snapshots").fetchone()[0])
