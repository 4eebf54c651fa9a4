"""Arrays as they come over the wire, protobuf or JSON: checked first, made into numpy after.

Everything becomes float32 or int64 (bfloat16 and int32 are widened, exactly). Dense float32 and int64 are views of the
message's bytes: read-only, nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuft.api.proto import wire_pb2
from tuft.errors import InvalidInput
from tuft.types import Float32Array, Int64Array

Array = npt.NDArray[np.generic]

_PROTO_DTYPES: Mapping[int, np.dtype[Any]] = {
    wire_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    wire_pb2.DTYPE_INT64: np.dtype("<i8"),
    wire_pb2.DTYPE_INT32: np.dtype("<i4"),
    wire_pb2.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_MAX_DIMENSIONS = 2
_MAX_LENGTH = 2**31


@dataclass(frozen=True, slots=True)
class WireTensor:
    """One array of ``loss_fn_inputs``, dense or compressed sparse rows, whose sizes are known to agree.

    ``values`` are all elements, or in a sparse tensor the listed ones; every other element is 0.
    """

    values: Array
    shape: tuple[int, ...]
    crow: Int64Array | None = None
    col: Int64Array | None = None

    @property
    def dense_bytes(self) -> int:
        return math.prod(self.shape) * self.values.itemsize

    def dense(self) -> Array:
        """The whole array, of ``shape``."""
        if self.crow is None or self.col is None:
            return self.values.reshape(self.shape)
        dense = np.zeros(self.shape, dtype=self.values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.crow))
        dense[rows, self.col] = self.values
        return dense


def from_proto(message: wire_pb2.Tensor, field: str) -> WireTensor:
    """Raises InvalidInput that names ``field``."""
    dtype = _PROTO_DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidInput(f"{field}.dtype", message.dtype, "must be 1 float32, 2 int64, 3 int32 or 4 bfloat16")
    shape = _checked_shape(list(message.shape), field)
    if message.HasField("sparse_csr"):
        sparse = message.sparse_csr
        values = _numbers(sparse.values, dtype, f"{field}.sparse_csr.values")
        crow = _numbers(sparse.crow_indices, np.dtype("<i8"), f"{field}.sparse_csr.crow_indices")
        col = _numbers(sparse.col_indices, np.dtype("<i8"), f"{field}.sparse_csr.col_indices")
        return _sparse(_widened(values), shape, crow, col, field)
    if not message.HasField("dense"):
        raise InvalidInput(field, "neither", "must hold dense or sparse_csr")
    return _dense(_widened(_numbers(message.dense, dtype, f"{field}.dense")), shape, field)


def from_json(tensor: object, field: str) -> WireTensor:
    """``{"data": [...], "dtype": "float32" | "int64", "shape": [...]}``, and for a sparse one ``sparse_crow_indices``
    and ``sparse_col_indices``. Raises InvalidInput that names ``field``."""
    if not isinstance(tensor, dict):
        raise InvalidInput(field, tensor, "must be an object with data, dtype and shape")
    dtype = tensor.get("dtype")
    if dtype not in ("float32", "int64"):
        raise InvalidInput(f"{field}.dtype", dtype, "must be 'float32' or 'int64'")
    values = floats_from_json if dtype == "float32" else integers_from_json
    data = values(tensor.get("data", []), f"{field}.data")
    shape = _checked_shape(tensor.get("shape") or [], field)
    crow, col = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
    if crow is None and col is None:
        return _dense(data, shape, field)
    crow_indices = integers_from_json(crow, f"{field}.sparse_crow_indices")
    return _sparse(data, shape, crow_indices, integers_from_json(col, f"{field}.sparse_col_indices"), field)


def tokens_from_bytes(data: bytes, field: str) -> Int64Array:
    """Token ids, sent as int32."""
    return _numbers(data, np.dtype("<i4"), field).astype(np.int64)


def integers_from_json(values: object, field: str) -> Int64Array:
    return _list_of(values, (int,), field, "must be a list of 64-bit integers").astype(np.int64)


def floats_from_json(values: object, field: str) -> Float32Array:
    array = _list_of(values, (int, float), field, "must be a list of numbers")
    with np.errstate(over="ignore"):  # too large for float32 is inf, and refused as such with the other bad numbers
        return array.astype(np.float32)


def _list_of(values: object, kinds: tuple[type, ...], field: str, allowed: str) -> npt.NDArray[Any]:
    if not isinstance(values, list):
        raise InvalidInput(field, values, allowed)
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.asarray(values, dtype=object)
    if array.size and array.dtype.kind not in ("i" if kinds == (int,) else "if"):
        strangers = (value for value in values if isinstance(value, bool) or not isinstance(value, kinds))
        raise InvalidInput(field, next(strangers, "a number of more than 64 bits"), allowed)
    if array.ndim != 1:
        raise InvalidInput(field, values[0], allowed)
    return array


def _numbers(data: bytes, dtype: np.dtype[Any], field: str) -> npt.NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise InvalidInput(field, f"{len(data)} bytes", f"must be a multiple of {dtype.itemsize} bytes")
    return np.frombuffer(data, dtype=dtype)


def _widened(values: npt.NDArray[Any]) -> Array:
    if values.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    if values.dtype == np.int32:
        return values.astype(np.int64)
    return values


def _checked_shape(shape: object, field: str) -> tuple[int, ...]:
    """Empty where the sender left it out, which stands for one dimension."""
    allowed = f"must be 1 or {_MAX_DIMENSIONS} lengths of 0 to {_MAX_LENGTH}"
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise InvalidInput(f"{field}.shape", shape, allowed)
    if not all(type(length) is int and 0 <= length <= _MAX_LENGTH for length in shape):
        raise InvalidInput(f"{field}.shape", shape, allowed)
    return tuple(shape)


def _dense(values: Array, shape: tuple[int, ...], field: str) -> WireTensor:
    shape = shape or (values.size,)
    if math.prod(shape) != values.size:
        raise InvalidInput(f"{field}.shape", list(shape), f"must hold as many elements as there are: {values.size}")
    return WireTensor(values, shape)


def _sparse(values: Array, shape: Sequence[int], crow: Int64Array, col: Int64Array, field: str) -> WireTensor:
    if len(shape) != 2:
        raise InvalidInput(f"{field}.shape", list(shape), "must be [rows, columns] for a sparse tensor")
    num_rows, num_columns = shape
    if crow.size != num_rows + 1 or crow[0] != 0 or crow[-1] != values.size or bool(np.any(np.diff(crow) < 0)):
        raise InvalidInput(
            f"{field}.crow_indices", crow, f"must be {num_rows + 1} numbers that rise from 0 to {values.size}"
        )
    if col.size != values.size or bool(np.any((col < 0) | (col >= num_columns))):
        raise InvalidInput(f"{field}.col_indices", col, f"must be {values.size} columns of 0 to {num_columns - 1}")
    rises = np.diff(col) > 0
    starts = crow[1:-1]  # a row's first column need not rise over the row before
    rises[starts[(starts > 0) & (starts < col.size)] - 1] = True
    if not bool(np.all(rises)):
        raise InvalidInput(f"{field}.col_indices", col, "must rise within each row")
    return WireTensor(values, (num_rows, num_columns), crow, col)
