"""The official SDK, unmodified, against a real server: the loop of a user's first hour."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, LiveServer

TOKENS = [5, 17, 80, 33, 150, 42, 7, 99, 12, 61, 200, 18]


@pytest.fixture
def client(tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> tinker.ServiceClient:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)


def train_client(client: tinker.ServiceClient, **options: object) -> tinker.TrainingClient:
    created = client.create_lora_training_client(TINY_MODEL, **{"rank": 4, "seed": 1, **options})  # type: ignore[arg-type]
    return created.result()


def datum(tokens: list[int] = TOKENS, weights: list[float] | None = None) -> types.Datum:
    targets = tokens[1:]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=targets, dtype="int64", shape=[len(targets)]),
            "weights": types.TensorData(data=weights or [1.0] * len(targets), dtype="float32", shape=[len(targets)]),
        },
    )


def step(training: tinker.TrainingClient, data: list[types.Datum], learning_rate: float = 1e-2) -> float:
    """One pipelined step; returns the masked NLL."""
    backward = training.forward_backward(data, "cross_entropy")
    update = training.optim_step(types.AdamParams(learning_rate=learning_rate))
    output = backward.result()
    metrics = update.result().metrics
    assert metrics is not None
    assert metrics["step:max"] >= 1
    logprobs = np.concatenate([np.asarray(out["logprobs"].data) for out in output.loss_fn_outputs])
    assert output.metrics["loss:sum"] == pytest.approx(-logprobs.sum(), rel=1e-4)
    return float(-logprobs.mean())


@pytest.mark.calls(
    "POST /api/v1/create_model",
    "POST /api/v1/get_info",
    "POST /api/v1/forward_backward",
    "POST /api/v1/optim_step",
    "POST /api/v1/retrieve_future",
    "POST /api/v1/create_sampling_session",
    "GET /api/v1/samplers/{}",
)
def test_training_lowers_the_loss_and_the_result_samples_what_it_learned(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    losses = [step(training, [datum()]) for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]
    path = training.save_weights_for_sampler("learned").result().path
    sampler = client.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    result = sampler.sample(types.ModelInput.from_ints(TOKENS[:6]), 1, params).result()
    assert result.sequences[0].tokens == TOKENS[6:10]


def test_what_was_saved_goes_on_as_if_it_had_never_stopped(client: tinker.ServiceClient) -> None:
    first = train_client(client)
    for _ in range(3):
        step(first, [datum()])
    path = first.save_state("half-way").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert [step(first, [datum()]) for _ in range(3)] == [step(resumed, [datum()]) for _ in range(3)]


def test_weights_alone_start_with_fresh_moments(client: tinker.ServiceClient) -> None:
    first = train_client(client)
    step(first, [datum()])
    path = first.save_state("weights-only").result().path
    resumed = client.create_training_client_from_state(path).result()
    metrics = resumed.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["step:max"] == 1


def test_loading_into_a_live_run_drops_its_gradients(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    path = training.save_state("start").result().path
    training.forward_backward([datum()], "cross_entropy").result()
    training.load_state(path).result()
    metrics = training.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] == 0.0


def test_gradients_accumulate_over_parallel_chunks_as_over_one_call(client: tinker.ServiceClient) -> None:
    many = [datum([(token + shift) % 300 for token in TOKENS]) for shift in range(1500)]  # two chunks of the SDK's
    whole, halves = train_client(client), train_client(client)
    whole.forward_backward(many, "cross_entropy").result()
    for part in (many[:750], many[750:]):
        halves.forward_backward(part, "cross_entropy").result()
    norms = [run.optim_step(types.AdamParams()).result().metrics["grad_norm:mean"] for run in (whole, halves)]  # type: ignore[index]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_forward_computes_the_same_and_leaves_no_gradient(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    forward = training.forward([datum()], "cross_entropy").result()
    metrics = training.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] == 0.0
    backward = training.forward_backward([datum()], "cross_entropy").result()
    assert forward.loss_fn_outputs[0]["logprobs"].data == backward.loss_fn_outputs[0]["logprobs"].data


def test_logprobs_come_for_every_position_whatever_its_weight(client: tinker.ServiceClient) -> None:
    weights = [0.0] * 6 + [1.0] * 5
    output = train_client(client).forward_backward([datum(weights=weights)], "cross_entropy").result()
    logprobs = output.loss_fn_outputs[0]["logprobs"].data
    assert len(logprobs) == 11
    assert all(math.isfinite(value) and value < 0 for value in logprobs)
    assert output.metrics["loss:sum"] == pytest.approx(-sum(logprobs[6:]), rel=1e-4)


def test_a_custom_loss_takes_the_sdks_two_passes(client: tinker.ServiceClient) -> None:
    import torch

    training = train_client(client)

    def squared(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.stack([(value**2).sum() for value in logprobs]).sum(), {"squared:sum": 1.0}

    output = training.forward_backward_custom([datum()], squared).result()
    assert output.metrics["squared:sum"] == 1.0
    metrics = training.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] > 0


def test_the_base_model_samples_several_sequences_with_logprobs(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=TINY_MODEL).result()
    params = types.SamplingParams(max_tokens=5, temperature=1.0, seed=3, stop=[])
    prompt = types.ModelInput.from_ints(TOKENS)
    first = sampler.sample(prompt, 3, params).result()
    again = sampler.sample(prompt, 3, params).result()
    assert [sequence.tokens for sequence in first.sequences] == [sequence.tokens for sequence in again.sequences]
    assert len({tuple(sequence.tokens) for sequence in first.sequences}) > 1
    assert all(len(sequence.logprobs or []) == 5 for sequence in first.sequences)


def test_compute_logprobs_equals_the_trainers_forward(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    for _ in range(5):
        step(training, [datum()])
    forward = training.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    sampler = training.save_weights_and_get_sampling_client().result()
    logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(forward, abs=1e-4)


def test_top_k_prompt_logprobs_hold_the_best_alternatives(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=TINY_MODEL).result()
    params = types.SamplingParams(max_tokens=1)
    result = sampler.sample(
        types.ModelInput.from_ints(TOKENS), 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3
    ).result()
    assert result.topk_prompt_logprobs is not None
    assert result.topk_prompt_logprobs[0] is None
    for row in result.topk_prompt_logprobs[1:]:
        values = [logprob for _, logprob in row or []]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)


def test_an_ephemeral_sampler_is_frozen_while_training_goes_on(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TOKENS)
    before = sampler.compute_logprobs(prompt).result()
    for _ in range(3):
        step(training, [datum()])
    assert sampler.compute_logprobs(prompt).result() == before


def test_checkpoints_and_runs_are_listed(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    training.save_state("listed").result()
    training.save_weights_for_sampler("listed").result()
    rest = client.create_rest_client()
    run_id = training.get_info().model_id
    run = rest.get_training_run(run_id).result()
    assert (run.base_model, run.lora_rank) == (TINY_MODEL, 4)
    found = rest.list_checkpoints(run_id).result().checkpoints
    assert sorted(checkpoint.checkpoint_id for checkpoint in found) == ["sampler_weights/listed", "weights/listed"]
    info = rest.get_weights_info_by_tinker_path(f"tinker://{run_id}/weights/listed").result()
    assert (info.base_model, info.lora_rank) == (TINY_MODEL, 4)
    assert run_id in [found.training_run_id for found in rest.list_training_runs().result().training_runs]


def test_a_name_that_exists_is_kept_unless_overwriting_is_asked_for(client: tinker.ServiceClient) -> None:
    training = train_client(client)
    training.save_state("twice").result()
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        training.save_state("twice").result()
    training.save_state("twice", overwrite=True).result()


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x" * 300, "nul\0", "ünïcode"])
def test_a_name_that_could_leave_its_place_is_refused(client: tinker.ServiceClient, name: str) -> None:
    training = train_client(client)
    with pytest.raises(tinker.RequestFailedError, match="must be 1 to 128|at most 128 characters|no NUL"):
        training.save_state(name).result()
    training.save_state("next-call-works").result()


@pytest.mark.parametrize("rank", [0, 10**9])
def test_a_rank_out_of_range_is_refused_at_once(client: tinker.ServiceClient, rank: int) -> None:
    with pytest.raises(tinker.BadRequestError, match=rf"rank: got {rank}; must be 1 to 256"):
        train_client(client, rank=rank)


def test_an_unknown_base_model_lists_what_there_is(client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match=f"got 'nobody/nothing'; this server has '{TINY_MODEL}'"):
        client.create_lora_training_client("nobody/nothing", rank=4).result()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (datum([1, 2, 384, 4]), r"data\[1\].model_input\[2\]: got 384; token ids of tiny/qwen3 are 0 to 383"),
        (datum(weights=[math.nan] * 11), r"data\[1\].loss_fn_inputs.weights\[0\]: got nan; must be a finite number"),
        (datum(list(range(1, 301)) * 2), r"data\[1\].model_input: got '599 tokens'; must be 1 to 512 tokens"),
    ],
)
def test_bad_data_fails_by_name_and_the_next_call_works(
    client: tinker.ServiceClient, bad: types.Datum, message: str
) -> None:
    training = train_client(client)
    with pytest.raises(tinker.RequestFailedError, match=message):
        training.forward_backward([datum(), bad], "cross_entropy").result()
    assert math.isfinite(step(training, [datum()]))


def test_targets_of_another_length_are_refused(client: tinker.ServiceClient) -> None:
    bad = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[2, 3], dtype="int64", shape=[2])},
    )
    with pytest.raises(tinker.RequestFailedError, match=r"shape \[2\]'; must be \[3\]"):
        train_client(client).forward_backward([bad], "cross_entropy").result()


def test_a_wrong_key_is_refused_and_the_message_says_what_to_look_at(tiny_server: LiveServer) -> None:
    stranger = tinker.ServiceClient(base_url=tiny_server.url, api_key="tml-wrong-key")
    with pytest.raises(tinker.AuthenticationError, match="ends in …-key.*prefer TINKER_API_KEY"):
        stranger.get_server_capabilities()
