"""GGUF files (version 2 and 3) read with numpy alone: metadata, and tensors dequantized to float32.

Layout: github.com/ggml-org/ggml, docs/gguf.md; block formats: ggml-quants.h. ``N`` blocks of 32 values.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuft.errors import ModelError
from tuft.types import Float32Array

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32

_TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Bytes = npt.NDArray[np.uint8]


def _dequantize_f32(raw: Bytes) -> Float32Array:
    return raw.view(np.float32).copy()


def _dequantize_f16(raw: Bytes) -> Float32Array:
    return raw.view(np.float16).astype(np.float32)


def _dequantize_bf16(raw: Bytes) -> Float32Array:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _dequantize_q8_0(raw: Bytes) -> Float32Array:
    """Blocks of a float16 scale and 32 int8."""
    blocks = raw.reshape(-1, 34)
    scale_N1 = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return np.multiply(blocks[:, 2:].view(np.int8), scale_N1, dtype=np.float32)


def _dequantize_q4_0(raw: Bytes) -> Float32Array:
    """Blocks of a float16 scale and 16 bytes: low nibbles are the first 16 values, high ones the last; zero at 8."""
    blocks = raw.reshape(-1, 18)
    scale_N1 = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (_nibbles(blocks[:, 2:]) - np.float32(8)) * scale_N1


def _dequantize_q4_1(raw: Bytes) -> Float32Array:
    """As Q4_0, with a float16 minimum after the scale instead of the zero at 8."""
    blocks = raw.reshape(-1, 20)
    scale_and_minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    values = _nibbles(blocks[:, 4:])
    values *= scale_and_minimum[:, :1]
    values += scale_and_minimum[:, 1:]
    return values


def _nibbles(packed: Bytes) -> Float32Array:
    values = np.empty((len(packed), 32), np.float32)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values


@dataclass(frozen=True, slots=True)
class _Encoding:
    name: str
    block_values: int
    block_bytes: int
    dequantize: Callable[[Bytes], Float32Array]


_ENCODINGS = {
    0: _Encoding("F32", 1, 4, _dequantize_f32),
    1: _Encoding("F16", 1, 2, _dequantize_f16),
    2: _Encoding("Q4_0", 32, 18, _dequantize_q4_0),
    3: _Encoding("Q4_1", 32, 20, _dequantize_q4_1),
    8: _Encoding("Q8_0", 32, 34, _dequantize_q8_0),
    30: _Encoding("BF16", 1, 2, _dequantize_bf16),
}


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    shape: tuple[int, ...]  # row-major, as numpy and Hugging Face have it; the file lists it reversed
    type_id: int
    offset_bytes: int  # from the start of the tensor data


class _Cursor:
    """Reads the little-endian header from front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self.position)
        self.position += struct.calcsize(code)
        return value

    def string(self) -> str:
        num_bytes = self.scalar("Q")
        start, self.position = self.position, self.position + num_bytes
        if self.position > len(self._data):
            raise struct.error(f"a string of {num_bytes} bytes at byte {start}")
        return self._data[start : self.position].decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalar(_SCALARS[type_id])
        item_type, length = self.scalar("I"), self.scalar("Q")
        if item_type in (_STRING, _ARRAY):
            return [self.value(item_type) for _ in range(length)]
        code = f"<{length}{_SCALARS[item_type]}"
        values = struct.unpack_from(code, self._data, self.position)
        self.position += struct.calcsize(code)
        return list(values)


class GgufFile:
    """One GGUF file, memory-mapped. ``metadata`` maps the file's keys to Python values."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ModelError if the file cannot be read, is damaged or not a GGUF file."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self._entries: dict[str, _TensorEntry] = {}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header(_Cursor(self._data))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (struct.error, KeyError, ValueError, ArithmeticError, MemoryError) as error:
            raise ModelError(f"{path}: damaged GGUF header: {error}") from error

    def _read_header(self, cursor: _Cursor) -> None:
        magic, version = cursor.scalar("4s"), cursor.scalar("I")
        if magic != _MAGIC:
            raise ModelError(f"{self.path}: not a GGUF file: starts with {magic!r}")
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version: got {version}; supported: 2 and 3, little-endian")
        num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(num_pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))
            self._entries[name] = _TensorEntry(shape[::-1], cursor.scalar("I"), cursor.scalar("Q"))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        self._data_start = math.ceil(cursor.position / alignment) * alignment

    def required(self, key: str) -> Any:
        """A metadata value that must be there; ModelError that names the key if it is not."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: metadata {key!r} is missing")
        return self.metadata[key]

    def _entry(self, name: str) -> _TensorEntry:
        if name not in self._entries:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        return self._entries[name]

    def tensor(self, name: str) -> Float32Array:
        """One tensor under its GGUF name, dequantized: a fresh float32 array. ModelError if its encoding is unknown."""
        entry = self._entry(name)
        encoding = _ENCODINGS.get(entry.type_id)
        if encoding is None:
            known = ", ".join(f"{encoding.name} ({type_id})" for type_id, encoding in _ENCODINGS.items())
            raise ModelError(
                f"{self.path}: tensor {name!r}: encoding {entry.type_id} is not supported; supported: {known}"
            )
        num_bytes = math.prod(entry.shape) // encoding.block_values * encoding.block_bytes
        start = self._data_start + entry.offset_bytes
        if start + num_bytes > len(self._data):
            raise ModelError(f"{self.path}: tensor {name!r} ends beyond the file: the file was cut short")
        raw = np.frombuffer(self._data, np.uint8, num_bytes, start)
        return encoding.dequantize(raw).reshape(entry.shape)

    def hf_tensors(self) -> Iterator[tuple[str, Float32Array]]:
        """Every tensor under its Hugging Face name; names that have none keep their own."""
        num_heads = self.required("llama.attention.head_count")
        num_kv_heads = self.metadata.get("llama.attention.head_count_kv", num_heads)
        for name in self._entries:
            tensor = self.tensor(name)
            if name.endswith("attn_q.weight"):
                tensor = _interleaved_to_halves(tensor, num_heads)
            elif name.endswith("attn_k.weight"):
                tensor = _interleaved_to_halves(tensor, num_kv_heads)
            yield _hf_name(name), tensor

    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` that Hugging Face would have for this file. ModelError unless it is a plain Llama."""
        architecture = self.required("general.architecture")
        if architecture != "llama":
            raise ModelError(f"{self.path}: GGUF architecture {architecture!r} is not supported; supported: 'llama'")
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ModelError(f"{self.path}: llama.rope.scaling.type: got {scaling!r}; only 'none' is supported")
        hidden_size, num_heads = self.required("llama.embedding_length"), self.required("llama.attention.head_count")
        head_dim = self.metadata.get("llama.attention.key_length", hidden_size // num_heads)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._entry("token_embd.weight").shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self.required("llama.feed_forward_length"),
            "num_hidden_layers": self.required("llama.block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.metadata.get("llama.attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "partial_rotary_factor": self.metadata.get("llama.rope.dimension_count", head_dim) / head_dim,
            "rms_norm_eps": self.required("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.metadata.get("llama.rope.freq_base", 10_000.0),
            "max_position_embeddings": self.required("llama.context_length"),
            "tie_word_embeddings": "output.weight" not in self._entries,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``."""
    match name.split("."):
        case ["blk", layer, kind, suffix] if kind in _LAYER_TENSOR_NAMES:
            return f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[kind]}.{suffix}"
        case [kind, suffix] if kind in _TENSOR_NAMES:
            return f"{_TENSOR_NAMES[kind]}.{suffix}"
    return name


def _interleaved_to_halves(weight: Float32Array, num_heads: int) -> Float32Array:
    """Undo llama.cpp's reordering of q and k: it rotates neighbouring channels (0 with 1), Hugging Face halves
    (0 with d/2), so the rows of each head are interleaved in the file."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)
