"""Checkpoints for the long run, through the SDK: shared, copied, exported, kept for a time."""

from __future__ import annotations

import datetime
import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.numpy
import tinker
from tinker import types

from tests.conftest import TEAM, TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import TOKENS, datum, step

PROMPT = types.ModelInput.from_ints(TOKENS)


@pytest.fixture(scope="module")
def _no_telemetry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        yield


@pytest.fixture(scope="module")
def owner_key(tiny_server: LiveServer) -> str:
    return tiny_server.create_key(f"{TEAM}-1")


@pytest.fixture(scope="module")
def owner(tiny_server: LiveServer, owner_key: str, _no_telemetry: None) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=tiny_server.url, api_key=owner_key)


@pytest.fixture(scope="module")
def other(tiny_server: LiveServer, _no_telemetry: None) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.create_key(f"{TEAM}-2"))


@pytest.fixture(scope="module")
def training(owner: tinker.ServiceClient) -> tinker.TrainingClient:
    """A run that has learned a little."""
    created = owner.create_lora_training_client(TINY_MODEL, rank=4, seed=1, user_metadata={"purpose": "tests"})
    training = created.result()
    step(training, [datum()])
    return training


@pytest.fixture(scope="module")
def paths(training: tinker.TrainingClient) -> list[str]:
    """One name for both kinds, as the cookbook saves it."""
    return [training.save_state("both").result().path, training.save_weights_for_sampler("both").result().path]


@pytest.fixture(scope="module")
def rest(owner: tinker.ServiceClient) -> tinker.RestClient:
    return owner.create_rest_client()


def shown(client: tinker.ServiceClient, path: str) -> types.Checkpoint:
    found = client.create_rest_client().list_user_checkpoints(limit=1000).result().checkpoints
    (checkpoint,) = [checkpoint for checkpoint in found if checkpoint.tinker_path == path]
    return checkpoint


def loss(training: tinker.TrainingClient) -> float:
    return training.forward([datum()], "cross_entropy").result().metrics["loss:sum"]


@pytest.mark.calls(
    "POST /api/v1/save_weights", "POST /api/v1/save_weights_for_sampler", "GET /api/v1/training_runs/{}/checkpoints"
)
def test_one_name_serves_both_kinds(
    training: tinker.TrainingClient, paths: list[str], owner: tinker.ServiceClient
) -> None:
    run_id = training.get_info().model_id
    assert paths == [f"tinker://{run_id}/weights/both", f"tinker://{run_id}/sampler_weights/both"]
    listed = owner.create_rest_client().list_checkpoints(run_id).result().checkpoints
    assert {(one.checkpoint_id, one.checkpoint_type) for one in listed} >= {
        ("weights/both", "training"),
        ("sampler_weights/both", "sampler"),
    }
    resumed = owner.create_training_client_from_state(paths[0]).result()
    sampler = owner.create_sampling_client(model_path=paths[1]).result()
    forward = resumed.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    assert sampler.compute_logprobs(PROMPT).result()[1:] == pytest.approx(forward, abs=1e-4)


@pytest.mark.calls("POST /api/v1/load_weights")
def test_state_resumes_in_the_same_run_and_in_a_new_one_as_if_it_had_never_stopped(
    owner: tinker.ServiceClient,
) -> None:
    """Weights, both moments, step count and what had accumulated: the next losses are equal to the last bit."""
    first = owner.create_lora_training_client(TINY_MODEL, rank=4, seed=3, train_unembed=False).result()
    step(first, [datum()])
    first.forward_backward([datum(TOKENS[::-1])], "cross_entropy").result()  # gradients that no step has used
    path = first.save_state("middle", user_metadata={"epoch": "1"}).result().path
    first.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    expected = [loss(first), step(first, [datum()]), loss(first)]
    resumed = owner.create_training_client_from_state_with_optimizer(path).result()
    first.load_state_with_optimizer(path).result()
    for training in (resumed, first):
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        assert [loss(training), step(training, [datum()]), loss(training)] == expected
    info = owner.create_rest_client().get_weights_info_by_tinker_path(path).result()
    assert (info.lora_rank, info.train_unembed, info.train_mlp, info.train_attn) == (4, False, True, True)
    assert shown(owner, path).user_metadata == {"epoch": "1"}


@pytest.mark.calls(
    "POST /api/v1/training_runs/{}/checkpoints/{}/publish",
    "DELETE /api/v1/training_runs/{}/checkpoints/{}/publish",
    "POST /api/v1/weights_info",
)
def test_a_published_checkpoint_is_everyones_to_use(
    rest: tinker.RestClient, other: tinker.ServiceClient, training: tinker.TrainingClient, paths: list[str]
) -> None:
    theirs = other.create_rest_client()
    for path in paths:
        with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
            theirs.get_weights_info_by_tinker_path(path).result()
        rest.publish_checkpoint_from_tinker_path(path).result()
    assert {one.public for one in rest.list_checkpoints(training.get_info().model_id).result().checkpoints} == {True}

    assert theirs.get_weights_info_by_tinker_path(paths[0]).result().base_model == TINY_MODEL
    resumed = other.create_training_client_from_state_with_optimizer(paths[0]).result()
    assert loss(resumed) == loss(training)
    live = other.create_lora_training_client(TINY_MODEL, rank=4, seed=9).result()
    live.load_state(paths[0]).result()
    assert loss(live) == loss(training)
    sampler = other.create_sampling_client(model_path=paths[1]).result()
    before = sampler.compute_logprobs(PROMPT).result()

    for path in paths:
        rest.unpublish_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
        live.load_state(paths[0]).result()
    with pytest.raises(tinker.NotFoundError):
        other.create_sampling_client(model_path=paths[1]).result()
    assert sampler.compute_logprobs(PROMPT).result() == before, "what was begun goes on"


@pytest.mark.calls("PUT /api/v1/training_runs/{}/checkpoints/{}/ttl", "GET /api/v1/checkpoints")
def test_a_ttl_is_set_and_taken_back(
    rest: tinker.RestClient, owner: tinker.ServiceClient, training: tinker.TrainingClient, paths: list[str]
) -> None:
    rest.set_checkpoint_ttl_from_tinker_path(paths[0], 7200).result()
    expires_at = shown(owner, paths[0]).expires_at
    assert expires_at is not None
    left = expires_at - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(seconds=7100) < left <= datetime.timedelta(seconds=7200)
    rest.set_checkpoint_ttl_from_tinker_path(paths[0], None).result()
    assert shown(owner, paths[0]).expires_at is None
    with pytest.raises(tinker.BadRequestError, match="must be 3600 to"):
        rest.set_checkpoint_ttl_from_tinker_path(paths[0], 60).result()
    with pytest.raises(tinker.RequestFailedError, match="ttl_seconds: got 60; must be 3600 to"):
        training.save_state("short", ttl_seconds=60).result()


@pytest.mark.calls("POST /api/v1/copy_weights", "GET /api/v1/training_runs", "GET /api/v1/training_runs/{}")
def test_a_copy_in_a_shared_project_is_for_its_members_and_outlives_its_source(
    rest: tinker.RestClient,
    owner: tinker.ServiceClient,
    other: tinker.ServiceClient,
    training: tinker.TrainingClient,
    tiny_server: LiveServer,
) -> None:
    source = training.save_weights_for_sampler("source", ttl_seconds=3600).result().path
    copy = rest.copy_weights(source, TEAM).result()
    assert copy.rpartition("/")[0] != source.rpartition("/")[0]
    assert copy.endswith("/sampler_weights/source")
    assert shown(owner, copy).expires_at is None
    rest.delete_checkpoint_from_tinker_path(source).result()
    sampler = other.create_sampling_client(model_path=copy).result()
    assert sampler.compute_logprobs(PROMPT).result()[0] is None

    theirs = other.create_rest_client()
    runs = theirs.list_training_runs(access_scope="accessible", project_id=TEAM).result().training_runs
    (run,) = [run for run in runs if run.training_run_id in copy]
    assert (run.model_owner, run.base_model, run.lora_rank) == (f"{TEAM}-1", TINY_MODEL, 4)
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == copy
    assert theirs.get_training_run(run.training_run_id, access_scope="accessible").result() == run
    assert theirs.list_training_runs(project_id=TEAM).result().cursor.total_count == 0
    with pytest.raises(tinker.NotFoundError):
        theirs.get_training_run(run.training_run_id).result()
    with pytest.raises(tinker.NotFoundError):
        theirs.delete_checkpoint_from_tinker_path(copy).result()
    stranger = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key).create_rest_client()
    with pytest.raises(tinker.NotFoundError):
        stranger.copy_weights(copy, TEAM).result()
    rest.publish_checkpoint_from_tinker_path(copy).result()
    label = stranger.copy_weights(copy, TEAM).result()  # no member: to them it is a name like any other
    assert label not in str(theirs.list_training_runs(access_scope="accessible", project_id=TEAM).result())


def test_the_owners_key_opens_a_checkpoint_to_another_account(
    owner: tinker.ServiceClient,
    other: tinker.ServiceClient,
    owner_key: str,
    training: tinker.TrainingClient,
    paths: list[str],
) -> None:
    with pytest.raises(tinker.NotFoundError):
        other.create_training_client_from_state(paths[0]).result()
    with pytest.raises(tinker.BadRequestError, match="weights_access_token: got '…rong'; must be an API key"):
        other.create_training_client_from_state(paths[0], weights_access_token="tml-wrong").result()
    resumed = other.create_training_client_from_state(paths[0], weights_access_token=owner_key).result()
    assert loss(resumed) == loss(training)
    copy = other.create_rest_client().copy_weights(paths[0], "hers", weights_access_token=owner_key).result()
    assert shown(other, copy).checkpoint_type == "training"


def fetched(url: str) -> bytes:
    """As the SDK's command line does: without a key."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
    return content


@pytest.mark.calls(
    "POST /api/v1/save_weights_external",
    "GET /api/v1/training_runs/{}/checkpoints/{}/external_weights_urls",
    "DELETE /api/v1/training_runs/{}/checkpoints/{}",
)
def test_external_weights_are_the_adapter_as_peft_reads_it(
    rest: tinker.RestClient, owner: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    saved = training.save_weights_external("export", ttl_seconds=3600).result()
    assert saved.path == f"tinker://{training.get_info().model_id}/external_weights/export"
    found = rest.get_external_weights_urls(saved.path).result()
    files = {name: fetched(url) for name, url in found.urls.items()}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == TINY_MODEL
    tensors = safetensors.numpy.load(files["adapter_model.safetensors"])
    assert len(tensors) == 2 * (7 * 2 + 1)  # two layers of seven linears, and the unembedding
    assert max(float(np.abs(array).max()) for name, array in tensors.items() if "lora_B" in name) > 0
    listed = shown(owner, saved.path)
    assert (listed.checkpoint_type, listed.size_bytes) == ("external", sum(map(len, files.values())))
    rest.delete_checkpoint_from_tinker_path(saved.path).result()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(found.urls["adapter_config.json"])
    with pytest.raises(tinker.NotFoundError):
        rest.get_external_weights_urls(saved.path).result()
