"""What a settled future holds, as the wire wants it: protobuf or JSON.

Only losses and samples exist in protobuf; the SDK asks for it since 0.19 and insists on it since 0.25.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from tuft.api.proto import wire_pb2
from tuft.api.sample_results import sample_json, sample_proto
from tuft.types import (
    CustomLossCreated,
    ExternalSaved,
    Float32Array,
    FutureResult,
    LossResult,
    OptimStepResult,
    RunCreated,
    RunUnloaded,
    SampleResult,
    SamplerSaved,
    WeightsLoaded,
    WeightsSaved,
)

PROTOBUF = "application/x-protobuf"
OUTPUT_TYPE = "ArrayRecord"
"""What the SDK calls the type of a loss's outputs."""


def encode_proto(result: LossResult | SampleResult) -> bytes:
    if isinstance(result, LossResult):
        return _loss_proto(result).SerializeToString()
    return sample_proto(result).SerializeToString()


def encode_json(result: FutureResult) -> bytes:
    """Infinities stay as Python writes them (``Infinity``), which the SDK reads back; a sample's missing prompt
    logprobs are null."""
    return json.dumps(_json(result), separators=(",", ":")).encode()


def _loss_proto(result: LossResult) -> wire_pb2.ForwardBackwardOutput:
    message = wire_pb2.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE, metrics=result.metrics)
    # one record holds datums of one trailing shape, and the records' order is the datums' order
    for trailing_shape, group in itertools.groupby(result.logprobs, key=lambda logprobs: logprobs.shape[1:]):
        arrays = [np.ascontiguousarray(logprobs, dtype="<f4") for logprobs in group]
        offsets = np.zeros(len(arrays) + 1, dtype="<i8")
        np.cumsum([array.nbytes for array in arrays], out=offsets[1:])
        batched = wire_pb2.BatchedTensor(
            data=b"".join(array.tobytes() for array in arrays),
            offsets=offsets.tobytes(),
            dtype=wire_pb2.DTYPE_FLOAT32,
            trailing_shape=trailing_shape,
        )
        message.loss_fn_outputs.append(
            wire_pb2.ArrayRecord(type_tag=OUTPUT_TYPE, fields={"logprobs": batched}, num_datums=len(arrays))
        )
    return message


def _json(result: FutureResult) -> Mapping[str, Any]:
    match result:
        case LossResult():
            return {
                "loss_fn_output_type": OUTPUT_TYPE,
                "loss_fn_outputs": [{"logprobs": _tensor_json(logprobs)} for logprobs in result.logprobs],
                "metrics": dict(result.metrics),
            }
        case SampleResult():
            return sample_json(result)
        case OptimStepResult():
            return {"type": "optim_step", "metrics": dict(result.metrics)}
        case RunCreated():
            return {"type": "create_model", "model_id": result.run_id}
        case RunUnloaded():
            return {"type": "unload_model", "model_id": result.run_id}
        case WeightsSaved():
            return {"type": "save_weights", "path": result.path}
        case SamplerSaved():
            return {
                "type": "save_weights_for_sampler",
                "path": result.path,
                "sampling_session_id": result.sampling_session_id,
            }
        case ExternalSaved():
            return {"type": "save_weights_external", "path": result.path, "size_bytes": result.size_bytes}
        case WeightsLoaded():
            return {"type": "load_weights", "path": result.path, "model_id": result.run_id}
        case CustomLossCreated():
            return {"type": "create_custom_loss", "loss_id": result.loss_id}


def _tensor_json(array: Float32Array) -> Mapping[str, Any]:
    return {"data": array.ravel().tolist(), "dtype": "float32", "shape": list(array.shape)}
