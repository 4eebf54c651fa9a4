"""Every loss through the official SDK: what is sampled is trained on, and what comes back is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.conftest import TINY_MODEL, LiveServer

PROMPT = [5, 17, 80, 33, 150, 42, 7]
HARD_TARGETS = [9, 12, 61, 200, 18, 4]
SOFT_WEIGHTS = [0.4, 0.2, 0.15, 0.1, 0.1, 0.05]
POLICY_LOSSES: Mapping[str, Mapping[str, float]] = {
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "cispo": {"clip_high_threshold": 3.0},
    "dro": {"beta": 0.1},
    "gspo": {"clip_low_threshold": 0.9997, "clip_high_threshold": 1.0004},
}


@pytest.fixture(scope="module")
def client(tiny_server: LiveServer) -> tinker.ServiceClient:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        return tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)


@pytest.fixture(scope="module")
def training(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()


@pytest.fixture(scope="module")
def sampled(training: tinker.TrainingClient) -> list[types.Datum]:
    """Four answers, as the cookbook makes data of them: zeros at the prompt's targets."""
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=4, stop=[])
    answers = sampler.sample(types.ModelInput.from_ints(PROMPT), 4, params).result().sequences
    data = []
    for number, answer in enumerate(answers):
        tokens, padding = [*PROMPT, *answer.tokens], [0.0] * (len(PROMPT) - 1)
        inputs: dict[str, list[float] | list[int]] = {
            "target_tokens": tokens[1:],
            "logprobs": [*padding, *(answer.logprobs or [])],
            "advantages": [*padding, *([number - 1.5] * len(answer.tokens))],
        }
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))  # type: ignore[arg-type]
    return data


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES)
def test_on_policy_the_ratio_is_1_and_the_logprobs_are_those_sampled(
    training: tinker.TrainingClient, sampled: list[types.Datum], loss_fn: types.LossFnType
) -> None:
    output = training.forward(sampled, loss_fn, dict(POLICY_LOSSES[loss_fn])).result()
    metrics = output.metrics
    assert metrics["logprob_diff:max"] < 1e-4
    assert 0 < metrics["logprob_diff:mean"] < 1e-4
    assert metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(metrics["kl_v1:mean"]) < 1e-4
    assert 0 < metrics["kl_v2:mean"] < 1e-8
    expected = 0.0
    for datum, out in zip(sampled, output.loss_fn_outputs, strict=True):
        p, advantages = np.array(out["logprobs"].data), np.array(datum.loss_fn_inputs["advantages"].data)
        q = np.array(datum.loss_fn_inputs["logprobs"].data)
        assert p[len(PROMPT) - 1 :] == pytest.approx(q[len(PROMPT) - 1 :], abs=1e-4)
        expected -= float((p * advantages if loss_fn in ("cispo", "dro") else advantages).sum())
        expected += 0.05 * float(((p - q) ** 2).sum()) if loss_fn == "dro" else 0.0
    assert metrics["loss:sum"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES)
def test_a_step_makes_what_was_rewarded_likelier(
    client: tinker.ServiceClient, sampled: list[types.Datum], loss_fn: types.LossFnType
) -> None:
    training = client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()

    def reward() -> float:
        outputs = training.forward(sampled, "cross_entropy").result().loss_fn_outputs
        pairs = zip(sampled, outputs, strict=True)
        return sum(float(np.dot(d.loss_fn_inputs["advantages"].data, out["logprobs"].data)) for d, out in pairs)

    before = reward()
    training.forward_backward(sampled, loss_fn).result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert reward() > before


def soft_datum(*, sparse: bool) -> types.Datum:
    """Six alternatives for the first token, one for the others: padded with id 0 and weight 0."""
    targets, weights = torch.zeros(6, 6, dtype=torch.int64), torch.zeros(6, 6)
    targets[0], targets[:, 0] = torch.tensor([9, 3, 77, 5, 41, 8]), torch.tensor(HARD_TARGETS)
    weights[0], weights[1:, 0] = torch.tensor(SOFT_WEIGHTS), 1.0
    given = (targets, weights) if sparse else (targets.numpy(), weights.numpy())
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(PROMPT[:6]),
        loss_fn_inputs={"target_tokens": given[0], "weights": given[1]},  # type: ignore[dict-item]
    )
    assert (datum.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None) == sparse
    return datum


def test_soft_targets_give_logprobs_of_their_shape_dense_or_sparse(training: tinker.TrainingClient) -> None:
    hard = types.Datum(
        model_input=types.ModelInput.from_ints(PROMPT[:6]),
        loss_fn_inputs={"target_tokens": HARD_TARGETS, "weights": [1.0] * 6},  # type: ignore[dict-item]
    )
    output = training.forward([soft_datum(sparse=True), hard, soft_datum(sparse=False)], "cross_entropy").result()
    sparse, one_column, dense = (out["logprobs"] for out in output.loss_fn_outputs)
    assert sparse.shape == dense.shape == [6, 6]
    assert sparse.data == dense.data
    logprobs = np.array(sparse.data).reshape(6, 6)
    assert logprobs[:, 0].tolist() == pytest.approx(list(one_column.data), rel=1e-6)
    of_soft = -np.dot(logprobs[0], SOFT_WEIGHTS) - logprobs[1:, 0].sum()
    assert output.metrics["loss:sum"] == pytest.approx(2 * of_soft - sum(one_column.data), rel=1e-5)


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("hinge", None, "this server computes cispo, cross_entropy"),
        ("ppo", {"clip": 0.2}, "got 'clip'; ppo takes clip_high_threshold, clip_low_threshold"),
        ("ppo", {"clip_low_threshold": "low"}, "clip_low_threshold: got 'low'; must be a finite number"),
        ("ppo", {"clip_low_threshold": 2.0}, "clip_low_threshold: got 2.0; must be at most clip_high_threshold"),
        ("gspo", {"clip_low_threshold": 3e-4, "clip_high_threshold": 4e-4}, "bounds the ratio: must be at least 1"),
        ("dro", {"beta": -1.0}, "beta: got -1.0; must not be negative"),
    ],
)
def test_a_wrong_option_is_named_and_the_next_call_works(
    training: tinker.TrainingClient,
    sampled: list[types.Datum],
    loss_fn: types.LossFnType,
    config: dict[str, float | str] | None,
    message: str,
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=message) as caught:
        training.forward(sampled, loss_fn, config).result()
    assert caught.value.category == types.RequestErrorCategory.User
    assert math.isfinite(training.forward(sampled, "ppo").result().metrics["loss:sum"])


def test_thresholds_of_single_tokens_hold_instead_of_the_operations(
    training: tinker.TrainingClient, sampled: list[types.Datum]
) -> None:
    datum = sampled[3]
    inputs = {**datum.loss_fn_inputs, "clip_high_threshold": types.TensorData([0.5] * 18, "float32", [18])}
    clipped = types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)  # type: ignore[arg-type]
    whole = training.forward([datum], "ppo", {"clip_low_threshold": 0.4}).result().metrics
    half = training.forward([clipped], "ppo", {"clip_low_threshold": 0.4}).result().metrics
    assert (whole["clip_fraction:mean"], half["clip_fraction:mean"]) == (0.0, 1.0)
    assert half["loss:sum"] == pytest.approx(whole["loss:sum"] / 2, rel=1e-3)
