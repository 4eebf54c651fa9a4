"""Sampling clients of the real SDK: hundreds of samples at once, copies in other processes, samples given up, weights
that change under a client, and a server that ends under it."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tinker
from starlette.types import ASGIApp, Receive, Scope, Send
from tinker import types

from tests.api.calls import ALICE, BASE_MODEL
from tests.api.conftest import Served, serving
from tests.e2e.test_sdk_loop import TOKENS, datum
from tuft.app import start_engine
from tuft.config import Config
from tuft.engine.worker import EngineProcess

PROMPT = types.ModelInput.from_ints(TOKENS)
MAX_ROWS = 64


@dataclass
class Traffic:
    """How many requests of each route are open at this moment, and the most that ever were."""

    opened: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)

    def around(self, app: ASGIApp) -> ASGIApp:
        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            route = scope.get("path", "").rpartition("/")[2]
            self.opened[route] += 1
            self.most[route] = max(self.most[route], self.opened[route])
            try:
                await app(scope, receive, send)
            finally:
                self.opened[route] -= 1

        return counted


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Config:
    return Config(
        home=tmp_path_factory.mktemp("clients"),
        server={"drain_timeout_s": 0.0, "long_poll_s": 5.0},
        engine={"device": "cpu", "num_threads": 1, "compiled_kernels": False, "max_decode_rows": MAX_ROWS},
        base_models=[{"name": BASE_MODEL, "path": str(tiny_model), "precision": "float32"}],
        keys=[{"tenant": "alice", "key": ALICE}],
    )


@pytest.fixture(scope="module")
def engine(config: Config) -> Iterator[EngineProcess]:
    process = start_engine(config)
    process.wait_ready(60)
    yield process
    process.close()


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture(scope="module")
def server(config: Config, engine: EngineProcess, traffic: Traffic) -> Iterator[Served]:
    with serving(config, engine, around=traffic.around) as served:
        yield served


@pytest.fixture
def client(server: Served, monkeypatch: pytest.MonkeyPatch) -> tinker.ServiceClient:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return tinker.ServiceClient(base_url=server.url, api_key=ALICE)


def params(max_tokens: int = 20, **more: Any) -> types.SamplingParams:
    return types.SamplingParams(**{"max_tokens": max_tokens, "seed": 7, "stop": [], **more})


def tokens_of(response: types.SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.calls("POST /api/v1/retrieve_futures")
def test_hundreds_of_samples_in_flight_hold_one_request(
    client: tinker.ServiceClient, server: Served, traffic: Traffic
) -> None:
    sampler = client.create_sampling_client(base_model=BASE_MODEL).result()
    traffic.most.clear()
    futures = [sampler.sample(PROMPT, 1, params(60, seed=seed)) for seed in range(300)]
    responses = [future.result() for future in futures]
    assert all(len(tokens) == 60 for response in responses for tokens in tokens_of(response))
    assert len({tuple(tokens_of(response)[0]) for response in responses}) > 290
    assert tokens_of(responses[0]) == tokens_of(sampler.sample(PROMPT, 1, params(60, seed=0)).result())
    print(f"most requests open at once: {dict(traffic.most)}")
    assert traffic.most["retrieve_futures"] <= 2  # one, and the last of the poll before it
    assert traffic.most["retrieve_future"] <= MAX_ROWS  # those that ended together are fetched together, and none held
    log = server.services.completions._logs
    until(lambda: not any(one.cursors for one in log.values()))  # the client has said that it has them all


def test_a_sample_that_fails_says_so_to_its_waiter_alone(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(BASE_MODEL, rank=4).result()
    training.forward_backward([datum()], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e30)).result()
    diverged = training.save_weights_and_get_sampling_client().result()
    sampler = client.create_sampling_client(base_model=BASE_MODEL).result()
    bad, good = diverged.sample(PROMPT, 1, params()), sampler.sample(PROMPT, 1, params())
    with pytest.raises(tinker.RequestFailedError, match="diverged"):
        bad.result()
    assert len(tokens_of(good.result())[0]) == 20


@pytest.mark.calls("POST /api/v1/join_sampling_session")
def test_copies_of_a_client_number_their_own_samples(client: tinker.ServiceClient, server: Served) -> None:
    sampler = client.create_sampling_client(base_model=BASE_MODEL).result()
    clients = [sampler, *(pickle.loads(pickle.dumps(sampler)) for _ in range(3))]
    futures = [one.sample(PROMPT, 1, params(seed=seed)) for one in clients for seed in range(5)]
    found = [tokens_of(future.result())[0] for future in futures]
    assert [found[first : first + 5] for first in range(0, 20, 5)] == [found[:5]] * 4
    assert sorted(one._cloned_sampler_id for one in clients) == [0, 1, 2, 3]


@pytest.mark.calls("POST /api/v1/cancel_future")
def test_samples_that_are_given_up_are_computed_no_further(client: tinker.ServiceClient, server: Served) -> None:
    sampler = client.create_sampling_client(base_model=BASE_MODEL).result()
    given_up = [sampler.sample(PROMPT, 8, params(480, seed=seed)) for seed in range(100)]  # a minute of work
    short = sampler.sample(PROMPT, 1, params(5))
    until(lambda: sampler._futures_poller is not None and len(sampler._futures_poller._events) == 101)  # it has the ids
    for future in given_up:
        future.future().cancel()
    assert len(tokens_of(short.result(timeout=20))[0]) == 5
    until(lambda: server.services.futures.num_pending == 0)


def test_inflight_clients_follow_the_run_and_snapshots_do_not(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(BASE_MODEL, rank=4, seed=1).result()

    def step() -> None:
        training.forward_backward([datum()], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-1)).result()

    first = training.save_weights_and_get_sampling_client(kind="inflight").result()
    frozen = training.save_weights_and_get_sampling_client().result()
    before = first.compute_logprobs(PROMPT).result()
    assert frozen.compute_logprobs(PROMPT).result() == before
    step()
    assert first.compute_logprobs(PROMPT).result() == before  # nothing was published
    second = training.save_weights_and_get_sampling_client(kind="inflight").result()
    after = training.save_weights_and_get_sampling_client().result().compute_logprobs(PROMPT).result()
    assert after != before
    assert [one.compute_logprobs(PROMPT).result() for one in (first, second, pickle.loads(pickle.dumps(first)))] == [
        after
    ] * 3
    assert frozen.compute_logprobs(PROMPT).result() == before


def test_a_client_goes_on_when_its_server_ends_and_another_begins(
    config: Config, engine: EngineProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    own = config.model_copy(update={"home": tmp_path, "server": config.server.model_copy(update={"long_poll_s": 0.3})})
    with serving(own, engine) as served:
        port = int(served.url.rpartition(":")[2])
        sampler = tinker.ServiceClient(base_url=served.url, api_key=ALICE).create_sampling_client(base_model=BASE_MODEL)
        expected = [sampler.sample(PROMPT, 1, params(seed=seed)).result() for seed in range(3)]
        blocking = sampler.sample(PROMPT, MAX_ROWS, params(480))  # the rest waits behind it
        waiting = [sampler.sample(PROMPT, 1, params(seed=seed)) for seed in range(3)]
        until(lambda: served.services.futures.num_pending == 4)
    blocking.future().cancel()
    with serving(own, engine, port):
        found = [future.result(timeout=30) for future in waiting]
        assert [tokens_of(one) for one in found] == [tokens_of(one) for one in expected]
