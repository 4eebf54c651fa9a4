"""How those parts of bodies look that ``wire`` and ``tensors`` read by hand: for the API's document."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, WithJsonSchema

from tuft.losses import LOSS_INPUTS, LOSS_SIGNATURES
from tuft.types import OptimizerParams

_INTEGERS = {"type": "array", "items": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}}
_INDICES = {"anyOf": [_INTEGERS, {"type": "null"}]}
_TENSOR = {
    "type": "object",
    "description": "dense; or, with both lists of indices, compressed sparse rows",
    "properties": {
        "data": {"type": "array", "items": {"type": "number"}},
        "dtype": {"type": "string", "enum": ["float32", "int64"]},
        "shape": {"anyOf": [{**_INTEGERS, "maxItems": 2}, {"type": "null"}]},
        "sparse_crow_indices": _INDICES,
        "sparse_col_indices": _INDICES,
    },
    "required": ["data", "dtype"],
}
_CHUNK = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["encoded_text"]}, "tokens": _INTEGERS},
    "required": ["tokens"],
}
_PROMPT = {
    "type": "object",
    "properties": {"chunks": {"type": "array", "items": _CHUNK}},
    "required": ["chunks"],
}
_DATUM = {
    "type": "object",
    "properties": {
        "model_input": _PROMPT,
        "loss_fn_inputs": {"type": "object", "properties": dict.fromkeys(sorted(LOSS_INPUTS), _TENSOR)},
    },
    "required": ["model_input", "loss_fn_inputs"],
}
_LOSS_INPUT = {
    "type": "object",
    "properties": {
        "data": {"type": "array", "items": _DATUM, "minItems": 1},
        "loss_fn": {"type": "string", "enum": [*LOSS_SIGNATURES, "custom"]},
        "loss_fn_config": {"type": "object", "additionalProperties": {"type": ["number", "string"]}},
    },
    "required": ["data", "loss_fn"],
}
_STOP = {
    "anyOf": [
        {"type": "null"},
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _INTEGERS,
    ],
}


def _named(params: type[OptimizerParams]) -> dict[str, Any]:
    """The params of one family, which its name tells from another's."""
    schema = TypeAdapter(params).json_schema()
    family = {"type": "string", "enum": [params.family]}
    return {**schema, "properties": {"type": family, **schema["properties"]}, "required": ["type"]}


OPTIMIZER_PARAMS = WithJsonSchema({"anyOf": [*map(_named, get_args(OptimizerParams)), {"type": "null"}]})
AnyTensor = Annotated[Any, WithJsonSchema(_TENSOR)]
Prompt = Annotated[Any, WithJsonSchema(_PROMPT)]
LossInput = Annotated[Any, WithJsonSchema(_LOSS_INPUT)]
Stop = Annotated[Any, WithJsonSchema(_STOP)]
