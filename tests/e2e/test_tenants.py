"""Two keys, one server: the second sees and reaches nothing of the first."""

from __future__ import annotations

import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import TOKENS, datum


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


def clients(server: LiveServer) -> tuple[tinker.ServiceClient, tinker.ServiceClient]:
    keys = server.create_key("alice"), server.create_key("bob")  # made while the server runs
    first, second = (tinker.ServiceClient(base_url=server.url, api_key=key) for key in keys)
    return first, second


def test_another_tenants_work_is_neither_listed_nor_reached(tiny_server: LiveServer) -> None:
    alice, bob = clients(tiny_server)
    training = alice.create_lora_training_client(TINY_MODEL, rank=4).result()
    path = training.save_state("mine").result().path
    sampler_path = training.save_weights_for_sampler("mine").result().path
    run_id = training.get_info().model_id

    rest = bob.create_rest_client()
    assert rest.list_training_runs().result().training_runs == []
    assert rest.list_user_checkpoints().result().checkpoints == []
    assert rest.list_sessions().result().sessions == []
    for call in (
        lambda: rest.get_training_run(run_id).result(),
        lambda: rest.list_checkpoints(run_id).result(),
        lambda: rest.get_weights_info_by_tinker_path(path).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(path).result(),
        lambda: bob.create_training_client_from_state(path).result(),
        lambda: bob.create_sampling_client(model_path=sampler_path).result(),
    ):
        with pytest.raises(tinker.NotFoundError):
            call()
    assert len(alice.create_rest_client().list_checkpoints(run_id).result().checkpoints) == 2


def test_a_neighbour_changes_no_number(tiny_server: LiveServer) -> None:
    alice, bob = clients(tiny_server)

    def train(neighbours: int) -> list[float]:
        mine = alice.create_lora_training_client(TINY_MODEL, rank=4, seed=5).result()
        others = [bob.create_lora_training_client(TINY_MODEL, rank=2 + n, seed=n).result() for n in range(neighbours)]
        losses = []
        for _ in range(5):
            pending = [other.forward_backward([datum(TOKENS[3:])] * 3, "cross_entropy") for other in others]
            loss = mine.forward_backward([datum(), datum(TOKENS[:4])], "cross_entropy")
            updates = [run.optim_step(types.AdamParams(learning_rate=1e-2)) for run in (mine, *others)]
            losses += [value for out in loss.result().loss_fn_outputs for value in out["logprobs"].data]
            for future in (*pending, *updates):
                future.result()
        return losses

    assert train(neighbours=0) == train(neighbours=3)


def test_a_bad_neighbour_fails_alone(tiny_server: LiveServer) -> None:
    alice, bob = clients(tiny_server)
    mine = alice.create_lora_training_client(TINY_MODEL, rank=4).result()
    other = bob.create_lora_training_client(TINY_MODEL, rank=4).result()
    bad = other.forward_backward([datum([1, 2, 9999, 3])], "cross_entropy")
    good = mine.forward_backward([datum()], "cross_entropy")
    assert good.result().metrics["loss:sum"] > 0
    with pytest.raises(tinker.RequestFailedError, match="9999"):
        bad.result()
