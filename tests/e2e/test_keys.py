"""Keys with scopes, and keys that end, as the SDK meets them."""

from __future__ import annotations

import json
import subprocess

import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, TUFT, LiveServer
from tests.e2e.test_sdk_loop import TOKENS, datum


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


def tuft(server: LiveServer, *words: str) -> str:
    """What the operator types beside the server."""
    command = [TUFT, *words, "--home", str(server.home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_key_that_only_samples_cannot_train_and_the_sdk_says_why(tiny_server: LiveServer) -> None:
    key = tuft(tiny_server, "key", "create", "--tenant", "sampling", "--scope", "sample").strip()
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=key)
    with pytest.raises(tinker.PermissionDeniedError, match="needs an API key of scope 'train'; this one .* has sample"):
        client.create_lora_training_client(TINY_MODEL, rank=4).result()
    with pytest.raises(tinker.PermissionDeniedError, match="scope 'read'"):
        client.create_rest_client().list_training_runs().result()
    sampler = client.create_sampling_client(base_model=TINY_MODEL)
    prompt = types.ModelInput.from_ints(TOKENS)
    assert len(sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2)).result().sequences) == 1


def test_a_key_that_only_trains_trains_saves_and_loads(tiny_server: LiveServer) -> None:
    key = tuft(tiny_server, "key", "create", "--tenant", "training", "--scope", "train").strip()
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    training.forward_backward([datum()], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    path = training.save_state("mine").result().path
    resumed = client.create_training_client_from_state(path).result()
    resumed.forward([datum()], "cross_entropy").result()


def test_a_key_that_is_revoked_during_a_session_is_refused(tiny_server: LiveServer) -> None:
    made = json.loads(tuft(tiny_server, "key", "create", "--tenant", "leaving", "--json"))
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=made["key"])
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    training.forward_backward([datum()], "cross_entropy").result()
    tuft(tiny_server, "key", "revoke", str(made["key_id"]))
    with pytest.raises(tinker.AuthenticationError, match="was revoked"):
        train_on(training)


def train_on(training: tinker.TrainingClient) -> None:
    """For much longer than the second within which the server follows."""
    for _ in range(1000):
        training.forward_backward([datum()], "cross_entropy").result()


def test_a_key_is_rotated_while_its_client_trains(tiny_server: LiveServer) -> None:
    made = json.loads(tuft(tiny_server, "key", "create", "--tenant", "rotating", "--json"))
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=made["key"])
    training = client.create_lora_training_client(TINY_MODEL, rank=4).result()
    path = training.save_state("mine").result().path
    new = tuft(tiny_server, "key", "rotate", str(made["key_id"]), "--grace-hours", "1").strip()
    training.forward_backward([datum()], "cross_entropy").result()
    later = tinker.ServiceClient(base_url=tiny_server.url, api_key=new)
    later.create_training_client_from_state(path).result().forward([datum()], "cross_entropy").result()


def test_a_suspended_tenant_is_told_so(tiny_server: LiveServer) -> None:
    key = tuft(tiny_server, "key", "create", "--tenant", "pausing").strip()
    tuft(tiny_server, "tenant", "suspend", "pausing")
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=key)
    with pytest.raises(tinker.PermissionDeniedError, match="'pausing' is suspended"):
        client.get_server_capabilities()
    tuft(tiny_server, "tenant", "resume", "pausing")
