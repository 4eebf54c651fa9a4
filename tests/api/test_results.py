"""What we encode is what the SDK decodes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tinker.proto.response_conv import deserialize_forward_backward_output
from tinker.types import load_weights_response, save_weights_response, unload_model_response
from tinker.types._pydantic_types import optim_step_response, save_weights_for_sampler_response

from tuft import types
from tuft.api import results

LOGPROBS = npst.arrays(np.float32, npst.array_shapes(max_dims=2, max_side=6))


@given(st.lists(LOGPROBS, max_size=6), st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3))
def test_the_sdk_reads_back_every_datums_logprobs_in_order(arrays: list[Any], metrics: dict[str, float]) -> None:
    body = results.encode_proto(types.LossResult(tuple(arrays), metrics))
    output = deserialize_forward_backward_output(body)
    assert output.loss_fn_output_type == "ArrayRecord"
    assert output.metrics == metrics
    assert len(output.loss_fn_outputs) == len(arrays)
    for sent, got in zip(arrays, output.loss_fn_outputs, strict=True):
        assert got["logprobs"].dtype == "float32"
        np.testing.assert_array_equal(got["logprobs"].to_numpy(), sent)


@given(st.lists(LOGPROBS, max_size=4))
def test_losses_in_json_are_those_in_protobuf(arrays: list[Any]) -> None:
    result = types.LossResult(tuple(arrays), {"loss:sum": 1.5})
    in_json = json.loads(results.encode_json(result))
    in_proto = deserialize_forward_backward_output(results.encode_proto(result))
    assert in_json["metrics"] == in_proto.metrics == {"loss:sum": 1.5}
    for a, b in zip(in_json["loss_fn_outputs"], in_proto.loss_fn_outputs, strict=True):
        tensor = tinker.TensorData(**a["logprobs"])
        np.testing.assert_array_equal(tensor.to_numpy(), b["logprobs"].to_numpy())


@pytest.mark.parametrize(
    ("result", "model", "expected"),
    [
        (types.RunCreated("s:train:0"), tinker.types.CreateModelResponse, {"model_id": "s:train:0"}),
        (types.RunUnloaded("s:train:0"), unload_model_response.UnloadModelResponse, {"model_id": "s:train:0"}),
        (types.OptimStepResult({"step:max": 1.0}), optim_step_response.OptimStepResponse, {"metrics": {"step:max": 1}}),
        (
            types.WeightsSaved("tinker://s:train:0/weights/a"),
            save_weights_response.SaveWeightsResponse,
            {"path": "tinker://s:train:0/weights/a"},
        ),
        (
            types.SamplerSaved(None, "s:sample:0"),
            save_weights_for_sampler_response.SaveWeightsForSamplerResponseInternal,
            {"path": None, "sampling_session_id": "s:sample:0"},
        ),
        (
            types.WeightsLoaded("tinker://s:train:0/weights/a", "s:train:1"),
            load_weights_response.LoadWeightsResponse,
            {"path": "tinker://s:train:0/weights/a", "model_id": "s:train:1"},
        ),
    ],
)
def test_the_sdks_models_accept_the_other_results(result: Any, model: Any, expected: dict[str, Any]) -> None:
    parsed = model.model_validate_json(results.encode_json(result))
    assert {key: getattr(parsed, key) for key in expected} == expected
