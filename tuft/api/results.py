"""What a settled future holds, as the wire wants it: protobuf or JSON.

Only losses and samples exist in protobuf; the SDK asks for it since 0.19 and insists on it since 0.25.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tuft.api.proto import wire_pb2
from tuft.types import (
    Float32Array,
    FutureResult,
    Int64Array,
    LossResult,
    OptimStepResult,
    RunCreated,
    RunUnloaded,
    SampledSequence,
    SampleResult,
    SamplerSaved,
    WeightsLoaded,
    WeightsSaved,
)

PROTOBUF = "application/x-protobuf"
OUTPUT_TYPE = "ArrayRecord"
"""What the SDK calls the type of a loss's outputs."""
EMPTY_LOGPROB = -99999.0
"""The wire's logprob of an empty cell of a top-k matrix, whose id is 0."""

_STOP_REASONS = {"stop": wire_pb2.STOP_REASON_STOP, "length": wire_pb2.STOP_REASON_LENGTH}


def encode_proto(result: LossResult | SampleResult) -> bytes:
    if isinstance(result, LossResult):
        return _loss_proto(result).SerializeToString()
    return _sample_proto(result).SerializeToString()


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


def _sample_proto(result: SampleResult) -> wire_pb2.SampleResponse:
    message = wire_pb2.SampleResponse()
    for sequence in result.sequences:
        message.sequences.append(
            wire_pb2.SampledSequence(
                stop_reason=_STOP_REASONS[sequence.stop_reason],
                tokens=sequence.tokens_N.astype("<i4").tobytes(),
                logprobs=sequence.logprobs_N.astype("<f4").tobytes(),
            )
        )
    if result.prompt_logprobs_P is not None:
        message.prompt_logprobs = result.prompt_logprobs_P.astype("<f4").tobytes()
    if result.topk_prompt_ids_PK is not None and result.topk_prompt_logprobs_PK is not None:
        length, k = result.topk_prompt_ids_PK.shape
        message.topk_prompt_logprobs.token_ids = result.topk_prompt_ids_PK.astype("<i4").tobytes()
        message.topk_prompt_logprobs.logprobs = result.topk_prompt_logprobs_PK.astype("<f4").tobytes()
        message.topk_prompt_logprobs.k = k
        message.topk_prompt_logprobs.length = length
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
            return dict(_sample_json(result))
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
        case WeightsLoaded():
            return {"type": "load_weights", "path": result.path, "model_id": result.run_id}


def _tensor_json(array: Float32Array) -> Mapping[str, Any]:
    return {"data": array.ravel().tolist(), "dtype": "float32", "shape": list(array.shape)}


def _sample_json(result: SampleResult) -> Iterator[tuple[str, Any]]:
    yield "type", "sample"
    yield "sequences", [_sequence_json(sequence) for sequence in result.sequences]
    if result.prompt_logprobs_P is not None:
        logprobs = result.prompt_logprobs_P.tolist()
        yield "prompt_logprobs", [None if math.isnan(logprob) else logprob for logprob in logprobs]
    if result.topk_prompt_ids_PK is not None and result.topk_prompt_logprobs_PK is not None:
        yield "topk_prompt_logprobs", _topk_json(result.topk_prompt_ids_PK, result.topk_prompt_logprobs_PK)


def _sequence_json(sequence: SampledSequence) -> Mapping[str, Any]:
    return {
        "stop_reason": sequence.stop_reason,
        "tokens": sequence.tokens_N.tolist(),
        "logprobs": sequence.logprobs_N.tolist(),
    }


def _topk_json(ids_PK: Int64Array, logprobs_PK: Float32Array) -> Sequence[Sequence[tuple[int, float]] | None]:
    rows = []
    for ids, logprobs in zip(ids_PK.tolist(), logprobs_PK.tolist(), strict=True):
        cells = [(token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if logprob != EMPTY_LOGPROB]
        rows.append(cells or None)
    return rows
