"""Requests of forward_backward off the wire, in protobuf and in the older SDKs' JSON.

Anything may arrive here: what is malformed is InvalidInput (or TooLarge), never another error, and what this server
cannot compute is refused by name instead of being left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from tuft.api import tensors
from tuft.api.body import check_count
from tuft.api.proto import wire_pb2
from tuft.api.tensors import WireTensor
from tuft.config import LimitsSection
from tuft.errors import InvalidInput, TooLarge
from tuft.types import Datum, Int64Array, ProvenanceSpan

TEXT_ONLY = "must be encoded_text: the models served here read text only"
MAX_SEQ_ID = 2**31 - 1
"""Of a run's operations; a sample's seq_id has 64 bits."""

_TOKEN_BYTES = 4
_MAX_ID_CHARS = 1000
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class LossRequest:
    """The payload of a forward or forward_backward; ``loss_fn_config`` values are numbers or texts."""

    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str]
    backward: bool


def decode_loss_request(body: bytes, limits: LimitsSection) -> LossRequest:
    """A ForwardBackwardRequest in protobuf.

    Dense arrays are read-only views of ``body``'s parts. Raises InvalidInput naming datum and field, and TooLarge if
    sparse tensors would fill more than ``limits.max_request_bytes`` when dense.
    """
    message = wire_pb2.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidInput("body", f"{len(body)} bytes", "must be a ForwardBackwardRequest in protobuf") from error
    check_count(message.data, "data", limits, "max_data")
    check_count(message.loss_fn_config, "loss_fn_config", limits, "max_names")
    check_count(message.loss_fn_config_v2, "loss_fn_config", limits, "max_names")
    num_tokens = 0
    parts = []
    for index, datum in enumerate(message.data):
        field = f"data[{index}]"
        check_count(datum.model_input, f"{field}.model_input", limits, "max_chunks")
        check_count(datum.loss_fn_inputs, f"{field}.loss_fn_inputs", limits, "max_names")
        num_tokens += sum(len(chunk.encoded_text.tokens) for chunk in datum.model_input) // _TOKEN_BYTES
        _check_tokens(num_tokens, "data", limits.max_tokens, "max_tokens")
        chunks = [_chunk_tokens(chunk, f"{field}.model_input[{i}]") for i, chunk in enumerate(datum.model_input)]
        tokens_T = _concatenated(chunks)
        inputs = {
            name: tensors.from_proto(tensor, f"{field}.loss_fn_inputs.{name}")
            for name, tensor in datum.loss_fn_inputs.items()
        }
        input_spans = _spans(datum.model_input_spans, len(tokens_T), f"{field}.model_input_spans")
        target_spans = _spans(datum.loss_fn_input_spans, len(tokens_T), f"{field}.loss_fn_input_spans")
        parts.append(_Parts(tokens_T, inputs, input_spans, target_spans))
    return LossRequest(_data(parts, limits), message.loss_fn, _config(message), backward=not message.forward_only)


def decode_loss_request_json(fields: object, limits: LimitsSection, *, backward: bool, field: str) -> LossRequest:
    """The same in JSON: ``{"data": [{"model_input": {"chunks": [...]}, "loss_fn_inputs": {...}}], "loss_fn": ...}``,
    which stands under the name ``field`` in the body."""
    request = _object(fields, field)
    loss_fn = request.get("loss_fn")
    if not isinstance(loss_fn, str):
        raise InvalidInput(f"{field}.loss_fn", loss_fn, "must be the name of a loss")
    config: dict[str, float | str] = {}
    sent_config = _object(request.get("loss_fn_config") or {}, f"{field}.loss_fn_config")
    check_count(sent_config, f"{field}.loss_fn_config", limits, "max_names")
    for key, value in sent_config.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise InvalidInput(f"{field}.loss_fn_config.{key}", value, "must be a number or a text")
        config[key] = value
    parts = []
    data = _list(request.get("data"), f"{field}.data")
    check_count(data, f"{field}.data", limits, "max_data")
    num_tokens = 0
    for index, item in enumerate(data):
        name = f"{field}.data[{index}]"
        datum = _object(item, name)
        tokens_T = _tokens_json(datum.get("model_input"), f"{name}.model_input", limits)
        num_tokens += len(tokens_T)
        _check_tokens(num_tokens, f"{field}.data", limits.max_tokens, "max_tokens")
        inputs = _object(datum.get("loss_fn_inputs") or {}, f"{name}.loss_fn_inputs")
        check_count(inputs, f"{name}.loss_fn_inputs", limits, "max_names")
        named = {key: tensors.from_json(value, f"{name}.loss_fn_inputs.{key}") for key, value in inputs.items()}
        parts.append(_Parts(tokens_T, named))
    return LossRequest(_data(parts, limits), loss_fn, config, backward=backward)


def prompt_tokens_json(model_input: object, field: str, limits: LimitsSection) -> Int64Array:
    """The tokens of ``{"chunks": [{"type": "encoded_text", "tokens": [...]}, ...]}``, chunk after chunk."""
    tokens_P = _tokens_json(model_input, field, limits)
    _check_tokens(len(tokens_P), field, limits.max_prompt_tokens, "max_prompt_tokens")
    return tokens_P


def _tokens_json(model_input: object, field: str, limits: LimitsSection) -> Int64Array:
    chunks = _list(_object(model_input, field).get("chunks"), f"{field}.chunks")
    check_count(chunks, f"{field}.chunks", limits, "max_chunks")
    parts = []
    for index, item in enumerate(chunks):
        name = f"{field}.chunks[{index}]"
        chunk = _object(item, name)
        kind = chunk.get("type", "encoded_text")
        if kind != "encoded_text":
            raise InvalidInput(f"{name}.type", kind, TEXT_ONLY)
        parts.append(tensors.integers_from_json(chunk.get("tokens"), f"{name}.tokens"))
    return _concatenated(parts)


def scan_envelope(body: bytes) -> tuple[str, int]:
    """``(model_id, seq_id)`` of a ForwardBackwardRequest that may be cut off or wrong further on.

    The client has used up the seq by sending it, so even a damaged request must be able to fail under it.
    Raises InvalidInput if the two cannot be read.
    """
    model_id: str | None = None
    seq_id: int | None = None
    try:
        for number, value in _top_level_fields(body):
            if number == 1 and isinstance(value, bytes):
                model_id = value.decode()
            elif number == 2 and isinstance(value, int):
                seq_id = value
            if model_id is not None and seq_id is not None:
                break
    except (IndexError, ValueError):  # cut off, or no protobuf at all
        pass
    if model_id is None or seq_id is None:
        raise InvalidInput("body", f"{len(body)} bytes", "must be a protobuf request with model_id and seq_id")
    if len(model_id) > _MAX_ID_CHARS:
        raise InvalidInput("model_id", model_id, f"must have at most {_MAX_ID_CHARS} characters")
    if not 1 <= seq_id <= MAX_SEQ_ID:
        raise InvalidInput("seq_id", seq_id, f"must be 1 to {MAX_SEQ_ID}")
    return model_id, seq_id


def _top_level_fields(body: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values as protobuf lays them out, until the end. IndexError where the body is cut off."""
    position = 0
    while position < len(body):
        key, position = _varint(body, position)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == _VARINT:
            value, position = _varint(body, position)
        elif kind in (_FIXED64, _LENGTH_DELIMITED, _FIXED32):
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if size is None:
                size, position = _varint(body, position)
            if position + size > len(body):
                raise IndexError
            value, position = body[position : position + size], position + size
        else:
            raise ValueError(f"wire type {kind}")
        yield number, value


def _varint(body: bytes, position: int) -> tuple[int, int]:
    """Base-128, low group first, at most ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a varint of more than ten bytes")


def _config(message: wire_pb2.ForwardBackwardRequest) -> Mapping[str, float | str]:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is None:
            raise InvalidInput(f"loss_fn_config_v2.{key}", "neither", "must hold a number or a text")
        config[key] = value.text if kind == "text" else value.number
    return config


def _chunk_tokens(chunk: wire_pb2.Chunk, field: str) -> Int64Array:
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise InvalidInput(field, kind or "an unknown kind", TEXT_ONLY)
    return tensors.tokens_from_bytes(chunk.encoded_text.tokens, f"{field}.encoded_text.tokens")


def _concatenated(chunks: Sequence[Int64Array]) -> Int64Array:
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A datum before its sparse tensors are dense."""

    tokens_T: Int64Array
    inputs: Mapping[str, WireTensor]
    input_spans: tuple[ProvenanceSpan, ...] = ()
    target_spans: tuple[ProvenanceSpan, ...] = ()


def _spans(spans: Sequence[wire_pb2.ProvenanceSpan], num_tokens: int, field: str) -> tuple[ProvenanceSpan, ...]:
    if len(spans) > num_tokens:
        raise InvalidInput(field, f"{len(spans)} spans", f"must be at most one for each of the {num_tokens} tokens")
    found = []
    for span in spans:
        is_sampled = span.WhichOneof("span") == "sampled_tokens"
        named = span.sampled_tokens if is_sampled else span.prompt_tokens
        found.append(ProvenanceSpan(named.sequence_id, is_sampled, named.offset, named.length))
    return tuple(found)


def _data(parts: Sequence[_Parts], limits: LimitsSection) -> tuple[Datum, ...]:
    limit_bytes = limits.max_request_bytes
    sparse_bytes = sum(
        tensor.dense_bytes for part in parts for tensor in part.inputs.values() if tensor.crow is not None
    )
    if sparse_bytes > limit_bytes:
        raise TooLarge(
            f"data: its sparse tensors are {sparse_bytes} bytes when dense; at most {limit_bytes} bytes are allowed "
            "(limits.max_request_bytes)"
        )
    return tuple(
        Datum(
            part.tokens_T,
            {name: tensor.dense() for name, tensor in part.inputs.items()},
            part.input_spans,
            part.target_spans,
        )
        for part in parts
    )


def _check_tokens(num_tokens: int, field: str, most: int, limit: str) -> None:
    if num_tokens > most:
        raise InvalidInput(field, f"{num_tokens} tokens", f"must be at most {most} (limits.{limit})")


def _object(value: object, field: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InvalidInput(field, value, "must be an object")
    return value


def _list(value: object, field: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise InvalidInput(field, value, "must be a list")
    return value
