"""Records as bytes, and back: what is journaled must be readable by the next process, and is data, never code.

    "TFT1" | crc32 of all that follows | length of the head | head, as JSON | arrays, each at a multiple of 8 bytes

In the head, a record is ``{"": its class's name, its fields}``, an array ``{"@": [dtype, shape, offset]}``, a mapping
``{"%": [[key, value], ...]}``, a float that JSON cannot say ``{"f": "nan"}``; sequences are lists, and come back as
tuples. A field that is left out has its default, so that a newer class reads what an older one wrote.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from tuft.errors import Damaged

_MAGIC = b"TFT1"
_PREFIX = struct.Struct("<4sII")
_ALIGNMENT = 8
_DTYPES = {"<i8", "<i4", "<f4", "<f8", "|b1", "|u1"}


class Encoding:
    """Of records of ``classes``, which are known by their names, and whatever those hold."""

    def __init__(self, classes: Iterable[type]) -> None:
        self._classes = {cls.__name__: cls for cls in classes}

    def encode(self, record: object) -> bytes:
        """Equal records give equal bytes."""
        arrays: list[np.ndarray[Any, Any]] = []
        head = json.dumps(_Head(arrays, self._classes).of(record), separators=(",", ":"), allow_nan=False).encode()
        head += b" " * (-(_PREFIX.size + len(head)) % _ALIGNMENT)
        parts = [head]
        for array in arrays:
            parts += [np.ascontiguousarray(array).tobytes(), b"\0" * (-array.nbytes % _ALIGNMENT)]
        body = b"".join(parts)
        checksum = zlib.crc32(body, len(head))
        return _PREFIX.pack(_MAGIC, checksum, len(head)) + body

    def decode(self, content: bytes) -> Any:
        """The record; its arrays are read-only views of ``content``. Raises Damaged if that is not what was encoded."""
        try:
            magic, checksum, num_head = _PREFIX.unpack_from(content)
            body = memoryview(content)[_PREFIX.size :]
            if magic != _MAGIC or zlib.crc32(body, num_head) != checksum:
                raise ValueError("its checksum is wrong")
            return self._value(json.loads(bytes(body[:num_head])), body[num_head:])
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"a record in the journal is damaged: {error}") from error

    def _value(self, seen: Any, arrays: memoryview) -> Any:
        if isinstance(seen, list):
            return tuple(self._value(item, arrays) for item in seen)
        if not isinstance(seen, dict):
            return seen
        if "@" in seen:
            dtype, shape, offset = seen["@"]
            return _array(dtype, shape, offset, arrays)
        if "%" in seen:
            return {key: self._value(value, arrays) for key, value in seen["%"]}
        if "f" in seen:
            return float(seen["f"])
        cls = self._classes[seen[""]]
        return cls(**{name: self._value(value, arrays) for name, value in seen.items() if name})


class _Head:
    """Turns a record into what JSON can say, and lays its arrays aside."""

    def __init__(self, arrays: list[np.ndarray[Any, Any]], classes: Mapping[str, type]) -> None:
        self._arrays = arrays
        self._classes = classes
        self._offset = 0

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, str | int):  # bool is an int
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"f": repr(value)}
        if isinstance(value, np.ndarray):
            return {"@": [value.dtype.str, list(value.shape), self._lay_aside(value)]}
        if isinstance(value, tuple | list):
            return [self.of(item) for item in value]
        if isinstance(value, Mapping):
            return {"%": [[key, self.of(value[key])] for key in sorted(value)]}
        name = type(value).__name__
        if not is_dataclass(value) or self._classes.get(name) is not type(value):
            raise TypeError(f"{name} is not journaled; list it in the encoding's classes")
        return {"": name} | {field.name: self.of(getattr(value, field.name)) for field in fields(value)}

    def _lay_aside(self, array: np.ndarray[Any, Any]) -> int:
        if array.dtype.str not in _DTYPES:
            raise TypeError(f"arrays of {array.dtype} are not journaled")
        self._arrays.append(array)
        offset = self._offset
        self._offset += array.nbytes + -array.nbytes % _ALIGNMENT
        return offset


def _array(dtype: str, shape: list[int], offset: int, arrays: memoryview) -> np.ndarray[Any, Any]:
    if dtype not in _DTYPES:
        raise ValueError(f"it holds an array of {dtype}")
    array = np.frombuffer(arrays, dtype, math.prod(shape), offset) if math.prod(shape) else np.empty(0, dtype)
    return array.reshape(shape)
