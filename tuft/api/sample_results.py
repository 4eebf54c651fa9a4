"""What a sample was, as the wire wants it: protobuf or JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuft.api.proto import wire_pb2
from tuft.types import EMPTY_LOGPROB, Matrix, SampledSequence, SampleResult, TokenLogprobs

_STOP_REASONS = {"stop": wire_pb2.STOP_REASON_STOP, "length": wire_pb2.STOP_REASON_LENGTH}


# --- protobuf ---------------------------------------------------------------------------------------------------------


def sample_proto(result: SampleResult) -> wire_pb2.SampleResponse:
    alternatives = result.prompt_alternatives
    targets = result.target_prompt_logprobs
    logprobs_P = result.prompt_logprobs_P
    return wire_pb2.SampleResponse(
        sequences=[_sequence_proto(sequence) for sequence in result.sequences],
        prompt_logprobs=None if logprobs_P is None else logprobs_P.astype("<f4").tobytes(),
        topk_prompt_logprobs=None if result.topk_prompt is None else _topk_proto(result.topk_prompt),
        prompt_cache_hit_tokens=result.prompt_cache_hit_tokens,
        target_prompt_logprobs=None if targets is None else _matrix_proto(targets),
        prompt_alt_tokens=None if alternatives is None else _alternatives_proto(alternatives),
    )


def _sequence_proto(sequence: SampledSequence) -> wire_pb2.SampledSequence:
    return wire_pb2.SampledSequence(
        stop_reason=_STOP_REASONS[sequence.stop_reason],
        tokens=sequence.tokens_N.astype("<i4").tobytes(),
        logprobs=sequence.logprobs_N.astype("<f4").tobytes(),
        topk_sampled_logprobs=None if sequence.topk is None else _topk_proto(sequence.topk),
    )


def _topk_proto(topk: TokenLogprobs) -> wire_pb2.TopkLogprobs:
    length, k = topk.ids_LK.shape
    token_ids, logprobs = topk.ids_LK.astype("<i4").tobytes(), topk.logprobs_LK.astype("<f4").tobytes()
    return wire_pb2.TopkLogprobs(token_ids=token_ids, logprobs=logprobs, k=k, length=length)


def _alternatives_proto(alternatives: TokenLogprobs) -> wire_pb2.PromptAltTokens:
    shape = alternatives.ids_LK.shape
    ids, logprobs = alternatives.ids_LK.astype("<i4").tobytes(), alternatives.logprobs_LK.astype("<f4").tobytes()
    return wire_pb2.PromptAltTokens(
        tokens=wire_pb2.Tensor(dense=ids, dtype=wire_pb2.DTYPE_INT32, shape=shape),
        logprobs=wire_pb2.Tensor(dense=logprobs, dtype=wire_pb2.DTYPE_FLOAT32, shape=shape),
    )


def _matrix_proto(matrix: Matrix) -> wire_pb2.Tensor:
    values = matrix.values_M.astype("<f4").tobytes()
    message = wire_pb2.Tensor(dtype=wire_pb2.DTYPE_FLOAT32, shape=matrix.shape)
    if matrix.crow is None or matrix.col is None:
        message.dense = values
    else:
        message.sparse_csr.values = values
        message.sparse_csr.crow_indices = matrix.crow.astype("<i8").tobytes()
        message.sparse_csr.col_indices = matrix.col.astype("<i8").tobytes()
    return message


# --- JSON -------------------------------------------------------------------------------------------------------------


def sample_json(result: SampleResult) -> Mapping[str, Any]:
    """Without the keys of what was not asked for."""
    return dict(_fields(result))


def _fields(result: SampleResult) -> Iterator[tuple[str, Any]]:
    yield "type", "sample"
    yield "sequences", [_sequence_json(sequence) for sequence in result.sequences]
    if result.prompt_logprobs_P is not None:
        logprobs = result.prompt_logprobs_P.tolist()
        yield "prompt_logprobs", [None if math.isnan(logprob) else logprob for logprob in logprobs]
    if result.topk_prompt is not None:
        yield "topk_prompt_logprobs", _topk_json(result.topk_prompt)
    if result.target_prompt_logprobs is not None:
        yield "target_prompt_logprobs", _matrix_json(result.target_prompt_logprobs)
    if result.prompt_alternatives is not None:
        shape = list(result.prompt_alternatives.ids_LK.shape)
        ids, logprobs = result.prompt_alternatives.ids_LK, result.prompt_alternatives.logprobs_LK
        yield (
            "prompt_alt_tokens",
            {
                "tokens": {"data": ids.ravel().tolist(), "dtype": "int64", "shape": shape},
                "logprobs": {"data": logprobs.ravel().tolist(), "dtype": "float32", "shape": shape},
            },
        )
    yield "prompt_cache_hit_tokens", result.prompt_cache_hit_tokens


def _sequence_json(sequence: SampledSequence) -> Mapping[str, Any]:
    fields = {
        "stop_reason": sequence.stop_reason,
        "tokens": sequence.tokens_N.tolist(),
        "logprobs": sequence.logprobs_N.tolist(),
    }
    return fields if sequence.topk is None else {**fields, "topk_logprobs": _topk_json(sequence.topk)}


def _topk_json(topk: TokenLogprobs) -> Sequence[Sequence[tuple[int, float]] | None]:
    rows = []
    for ids, logprobs in zip(topk.ids_LK.tolist(), topk.logprobs_LK.tolist(), strict=True):
        cells = [(token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if logprob != EMPTY_LOGPROB]
        rows.append(cells or None)
    return rows


def _matrix_json(matrix: Matrix) -> Mapping[str, Any]:
    fields = {"data": matrix.values_M.tolist(), "dtype": "float32", "shape": list(matrix.shape)}
    if matrix.crow is None or matrix.col is None:
        return fields
    return {**fields, "sparse_crow_indices": matrix.crow.tolist(), "sparse_col_indices": matrix.col.tolist()}
