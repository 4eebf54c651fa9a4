"""Engine and server are killed under the real SDK: nothing that was acknowledged is lost, nothing is done twice."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from faults.server import Server
from tests.conftest import TINY_MODEL, tiny_config
from tests.e2e.test_sdk_loop import TOKENS, datum

STEP = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    room_for_one = "[engine]\nrun_memory_gib = 0.00024\n"  # of rank 4: the runs of a test leave memory for each other
    running = Server(tmp_path_factory.mktemp("durable") / "home", tiny_config(tiny_model, room_for_one))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=server.url, api_key=server.key)


def begin(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(TINY_MODEL, rank=4, seed=3).result()


def step(training: tinker.TrainingClient) -> Any:
    loss = training.forward_backward([datum()], "cross_entropy")
    training.optim_step(STEP)
    return loss


def losses(futures: list[Any]) -> list[float]:
    return [future.result().metrics["loss:sum"] for future in futures]


def test_a_killed_engine_is_a_delay_and_changes_no_number(server: Server, client: tinker.ServiceClient) -> None:
    twin, runs = begin(client), [begin(client), begin(client)]
    expected = losses([step(twin) for _ in range(6)])
    first = [losses([step(run) for _ in range(2)]) for run in runs]
    sampler = runs[0].save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TOKENS)
    before = sampler.compute_logprobs(prompt).result()
    under_way = [[step(run) for run in runs] for _ in range(2)]
    assert server.kill_engine()
    assert httpx.get(f"{server.url}/api/v1/healthz").json() == {"status": "ok"}
    later = [[step(run) for run in runs] for _ in range(2)]
    for begun, *rest in zip(first, *under_way, *later, strict=True):
        assert begun + losses(rest) == expected
    assert sampler.compute_logprobs(prompt).result() == before


def test_a_killed_server_is_a_delay_and_changes_no_number(server: Server, client: tinker.ServiceClient) -> None:
    twin, runs = begin(client), [begin(client), begin(client)]
    expected = losses([step(twin) for _ in range(6)])
    first = [losses([step(run) for _ in range(2)]) for run in runs]
    saved = runs[0].save_state("before").result().path
    under_way = [[step(run) for run in runs] for _ in range(2)]
    for _ in range(2):
        server.kill()
        server.start()
    later = [[step(run) for run in runs] for _ in range(2)]
    for begun, *rest in zip(first, *under_way, *later, strict=True):
        assert begun + losses(rest) == expected
    resumed = client.create_training_client_from_state_with_optimizer(saved).result()
    assert losses([step(resumed) for _ in range(4)]) == expected[2:]


def post(server: Server, path: str, /, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/api/v1/{path}", json=body, headers={"X-API-Key": server.key}, timeout=60)


def settled(server: Server, request_id: str) -> Any:
    while (answer := post(server, "retrieve_future", request_id=request_id)).status_code == 408:
        pass
    return answer.json()


def requests(server: Server) -> dict[str, tuple[str, dict[str, Any]]]:
    """One of each kind of request whose answer is a future: its path and body. The first makes the run."""
    session_id = post(server, "create_session", tags=[], user_metadata={}, sdk_version="x").json()["session_id"]
    run = {"model_id": f"{session_id}:train:0"}
    chunk = {"type": "encoded_text", "tokens": TOKENS[:-1]}
    data = [
        {
            "model_input": {"chunks": [chunk]},
            "loss_fn_inputs": {"target_tokens": {"data": TOKENS[1:], "dtype": "int64", "shape": [len(TOKENS) - 1]}},
        }
    ]
    loss = {"data": data, "loss_fn": "cross_entropy"}
    lora = {"session_id": session_id, "model_seq_id": 0, "base_model": TINY_MODEL, "lora_config": {"rank": 4}}
    sampler = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": TINY_MODEL}
    sampling_session = post(server, "create_sampling_session", **sampler).json()["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
    sample = {"sampling_session_id": sampling_session, "seq_id": 0, "prompt": prompt, "num_samples": 1}
    graph = {"session_id": session_id, "custom_loss_seq_id": 0, "name": "x", "inputs": [], "graph": {"nodes": []}}
    return {
        "create_model": ("create_model", lora),
        "forward_backward": ("forward_backward", {**run, "seq_id": 1, "forward_backward_input": loss}),
        "optim_step": ("optim_step", {**run, "seq_id": 2, "adam_params": {"learning_rate": 0.01}}),
        "save_weights": ("save_weights", {**run, "seq_id": 3, "path": "once"}),
        "save_weights_for_sampler": (
            "save_weights_for_sampler",
            {**run, "seq_id": 4, "sampling_session_seq_id": 7},
        ),
        "load_weights": (
            "load_weights",
            {**run, "seq_id": 5, "path": f"tinker://{run['model_id']}/weights/once", "optimizer": True},
        ),
        "asample": ("asample", {**sample, "sampling_params": {"max_tokens": 3}}),
        "create_custom_loss": ("create_custom_loss", graph),
        "unload_model": ("unload_model", run),
    }


def test_every_request_is_done_once_however_often_it_comes_also_across_a_restart(server: Server) -> None:
    kinds = requests(server)
    ids: dict[str, set[str]] = {name: set() for name in kinds}
    results = {}
    with ThreadPoolExecutor(5) as threads:

        def five_times(name: str) -> None:
            path, body = kinds[name]
            answers = list(threads.map(lambda _: post(server, path, **body), range(5)))
            assert [answer.status_code for answer in answers] == [200] * 5, answers[0].text
            ids[name].update(answer.json()["request_id"] for answer in answers)

        for name in kinds:
            five_times(name)
            results[name] = settled(server, next(iter(ids[name])))
        server.kill()
        server.start()
        for name in kinds:
            five_times(name)
    assert {name: len(found) for name, found in ids.items()} == dict.fromkeys(kinds, 1)
    assert {name: settled(server, next(iter(found))) for name, found in ids.items()} == results
    failed = [name for name, result in results.items() if "error" in result]
    assert failed == ["create_custom_loss"], "an empty graph is no loss; that is remembered, too"
    run_id = kinds["unload_model"][1]["model_id"]
    assert len(list(server.home.glob(f"checkpoints/*/{run_id}/once-*"))) == 1
    with sqlite3.connect(server.home / "tuft.sqlite3") as database:
        query = "select sum(quantity) from ledger where kind = 'training' and session_id = ?"
        (num_tokens,) = database.execute(query, [run_id.split(":")[0]]).fetchone()
    assert num_tokens == len(TOKENS) - 1


CHANGED: dict[str, dict[str, Any]] = {
    "create_model": {"lora_config": {"rank": 8}},
    "forward_backward": {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}},
    "optim_step": {"adam_params": {"learning_rate": 0.5}},
    "save_weights": {"path": "twice"},
    "save_weights_for_sampler": {"sampling_session_seq_id": 8},
    "load_weights": {"optimizer": False},
    "asample": {"num_samples": 2},
    "create_custom_loss": {"name": "y"},
}
"""What each request is not when it comes for the second time; there are no two ways to unload a run."""


def test_another_request_of_the_same_seq_is_an_error_that_is_not_retried(server: Server) -> None:
    kinds = requests(server)
    accepted = {name: post(server, kinds[name][0], **kinds[name][1]).json()["request_id"] for name in CHANGED}

    def complain() -> None:
        for name, change in CHANGED.items():
            path, body = kinds[name]
            refused = post(server, path, **{**body, **change})
            assert refused.status_code == 400, f"{name}: {refused.text}"
            assert "was used by another request; a retry must repeat the first one" in refused.json()["detail"]

    complain()
    server.kill()
    server.start()
    complain()
    assert "error" not in settled(server, accepted["load_weights"]), "the first request of each is none the worse"


def test_what_a_killed_server_had_saved_verifies(server: Server, client: tinker.ServiceClient) -> None:
    training = begin(client)
    step(training).result()
    saves = [training.save_state(f"s{number}") for number in range(3)]
    server.kill()
    server.start()
    paths = [save.result().path for save in saves]
    contents = set()
    for path in paths:
        run_id, _, name = path.removeprefix("tinker://").split("/")
        (file,) = server.home.glob(f"checkpoints/*/{run_id}/{name}-*/adapter_model.safetensors")
        contents.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(contents) == 1
    verified = subprocess.run(
        [Path(sys.executable).with_name("tuft"), "checkpoint", "verify", "--home", server.home],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_stopped_server_ends_its_engine_exits_zero_and_has_little_to_do_again(
    tmp_path: Path, tiny_model: Path
) -> None:
    server = Server(tmp_path / "home", tiny_config(tiny_model))
    server.start()
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = begin(client)
    waiting = [training.forward_backward([datum()] * 20, "cross_entropy") for _ in range(3)]
    saved = training.save_state("last-words")
    waiting[0].result()
    pid = server.engine_pid()
    assert server.stop() == 0
    assert not Path(f"/proc/{pid}").exists()
    run_id = training.model_id
    assert list(server.home.glob(f"checkpoints/*/{run_id}/last-words-*/manifest.json"))
    assert len(list(server.home.glob(f"snapshots/{run_id}/*"))) == 1
    server.start()
    assert saved.result().path.endswith("/last-words")
    assert np.isfinite(losses([step(training)])).all()
    server.stop()
