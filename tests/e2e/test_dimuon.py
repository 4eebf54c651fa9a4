"""Dimuon through the SDK: chosen when a run is created, fixed for its life, resumed with its momentum."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import datum

PARAMS = types.DimuonParams(learning_rate=0.05)


def new_run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(
        TINY_MODEL, rank=4, seed=1, optimizer=types.DimuonOptimizerConfig()
    ).result()


def step(training: tinker.TrainingClient) -> tuple[float, Mapping[str, float]]:
    """The loss before a step, and the step's metrics."""
    backward = training.forward_backward([datum()], "cross_entropy")
    metrics = training.optim_step(PARAMS).result().metrics
    assert metrics is not None
    return backward.result().metrics["loss:sum"], metrics


def test_a_run_of_dimuon_learns_and_resumes_as_if_it_had_never_stopped(
    tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    training = new_run(client)
    assert training.get_info().optimizer_config.model_dump() == {"type": "dimuon", "version": 1}
    steps = [step(training) for _ in range(3)]
    losses = [loss for loss, _ in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    _, last = steps[-1]
    assert last["step:max"] == 3
    assert last["learning_rate:mean"] == 0.05
    assert last.keys() >= {"grad_norm:mean", "update_norm:mean", "effective_rank:mean"}

    path = training.save_state("dimuon").result().path
    info = client.create_rest_client().get_weights_info_by_tinker_path(path).result()
    assert info.optimizer_config.model_dump() == {"type": "dimuon", "version": 1}
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().optimizer_config.type == "dimuon"
    assert [step(training) for _ in range(2)] == [step(resumed) for _ in range(2)]

    with pytest.raises(tinker.RequestFailedError, match="adam_params: got 'adamw'; the run's optimizer is 'dimuon'"):
        resumed.optim_step(types.AdamParams()).result()
    weights_alone = client.create_training_client_from_state(path).result()
    assert weights_alone.get_info().optimizer_config.type == "adamw"
    with pytest.raises(tinker.RequestFailedError, match="its optimizer is 'dimuon', the run's is 'adamw'"):
        weights_alone.load_state_with_optimizer(path).result()
    weights_alone.load_state(path).result()
    metrics = weights_alone.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["step:max"] == 1
