"""Sample, say where each token comes from, train: the contract of stable_reinforce through the SDK."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, LiveServer

PROMPT = [5, 17, 80, 33]


@pytest.fixture
def training(tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> tinker.TrainingClient:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=tiny_server.url, api_key=tiny_server.key)
    return client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()


def sampled(training: tinker.TrainingClient, record: bool = True) -> list[types.SampledSequence]:
    sampler = training.save_weights_and_get_sampling_client(record_stability_info=record)
    params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=3, stop=[])
    return list(sampler.sample(types.ModelInput.from_ints(PROMPT), 2, params).result().sequences)


def data_of(sequences: list[types.SampledSequence], advantages: tuple[float, ...] = (1.0, -1.0)) -> list[types.Datum]:
    data = []
    for sequence, advantage in zip(sequences, advantages, strict=True):
        given, num_sampled = len(PROMPT), len(sequence.tokens)
        datum = types.Datum(
            model_input=types.ModelInput.from_ints([*PROMPT, *sequence.tokens[:-1]]),
            loss_fn_inputs={
                "target_tokens": np.array([0] * (given - 1) + sequence.tokens),
                "advantages": np.array([0.0] * (given - 1) + [advantage] * num_sampled, dtype=np.float32),
            },
        )
        sequence_id = sequence.sequence_id
        data.append(
            datum.with_provenance(
                model_input=[
                    types.PromptProvenanceSpan(sequence_id=sequence_id, length=given),
                    types.SampledProvenanceSpan(sequence_id=sequence_id, length=num_sampled - 1),
                ],
                loss_fn_inputs=[
                    types.PromptProvenanceSpan(sequence_id=sequence_id, offset=1, length=given - 1),
                    types.SampledProvenanceSpan(sequence_id=sequence_id, length=num_sampled),
                ],
            )
        )
    return data


def test_on_policy_it_trains_by_what_the_server_recorded(
    training: tinker.TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    sequences = sampled(training)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = training.forward_backward(data_of(sequences), "stable_reinforce", {"kl_coeff": 0.0}).result()
    notes = [record for record in caplog.records if "Tinker does not publish its objective" in record.getMessage()]
    assert len(notes) == 1, "once a run"
    assert result.metrics["logprob_diff:max"] < 1e-4
    advantages = [1.0, -1.0]
    logprobs = [np.asarray(sequence.logprobs) for sequence in sequences]
    expected = -sum(a * p.sum() for a, p in zip(advantages, logprobs, strict=True))
    assert result.metrics["loss:sum"] == pytest.approx(expected, abs=1e-2)
    assert training.optim_step(types.AdamParams()).result().metrics["grad_norm:mean"] > 0


def test_what_was_not_recorded_cannot_be_trained_on(training: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="record_stability_info=True"):
        training.forward_backward(data_of(sampled(training, record=False)), "stable_reinforce").result()


def test_data_without_provenance_are_refused_by_name(training: tinker.TrainingClient) -> None:
    (datum, _) = data_of(sampled(training))
    bare = types.Datum(model_input=datum.model_input, loss_fn_inputs=datum.loss_fn_inputs)
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\].model_input_spans"):
        training.forward_backward([bare], "stable_reinforce").result()
