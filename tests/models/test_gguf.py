"""The GGUF reader against the `gguf` package and against transformers' own GGUF load."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import make_tiny_model
from tuft.embedded import find_embedded
from tuft.errors import ModelError
from tuft.models.gguf import GgufFile
from tuft.models.load import load_weights

LLAMA_METADATA: dict[str, int | float] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
    "rope.dimension_count": 16,
    "vocab_size": 384,
}
QUANTIZATION = gguf.GGMLQuantizationType


def write_gguf(file: Path, tensors: dict[str, tuple[np.ndarray, Any]], metadata: dict[str, Any]) -> Path:
    """``tensors``: GGUF name to (float32 array, quantization type)."""
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_of_tiny_llama(directory: Path, kind: Any = QUANTIZATION.F32, **changes: int | float | str) -> Path:
    """A tiny Llama converted as llama.cpp does it: its names, and q and k rows interleaved."""
    tensors: dict[str, tuple[np.ndarray, Any]] = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, array in load_file(make_tiny_model("llama", directory / "hf") / "model.safetensors").items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:
            array = array.reshape(heads, 2, len(array) // heads // 2, 64).swapaxes(1, 2).reshape(array.shape)
        stored = kind if array.ndim == 2 else QUANTIZATION.F32
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        tensors[gguf_name] = (np.ascontiguousarray(array), stored)
    metadata = {f"llama.{key}": value for key, value in LLAMA_METADATA.items()} | changes
    return write_gguf(directory / "model.gguf", tensors, {"general.name": "tiny", **metadata})


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_tensors_dequantize_as_the_gguf_package_does_it(kind: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    file = write_gguf(tmp_path / "x.gguf", {"x": (array, QUANTIZATION[kind])}, {})
    (stored,) = gguf.GGUFReader(file).tensors
    expected = gguf.quants.dequantize(stored.data, QUANTIZATION[kind])

    found = GgufFile(file).tensor("x")
    assert found.dtype == np.float32
    assert found.flags.writeable
    assert np.array_equal(found, expected)
    assert np.abs(found - array).max() < 0.3  # both readers together could still have misunderstood the writer


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    metadata = {"a": True, "b": 7, "c": 0.5, "d": "naïve", "e": [1, 2, 3], "f": ["x", "ÿ"], "g": [0.5, 1.5]}
    file = write_gguf(tmp_path / "x.gguf", {}, metadata)
    read = GgufFile(file).metadata
    assert {key: read[key] for key in metadata} == metadata


def test_an_alignment_of_its_own_is_respected(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(256)
    arrays = {name: np.full((2, 3), value, np.float32) for name, value in (("x", 1.0), ("y", 2.0))}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, array in arrays.items():
        assert np.array_equal(GgufFile(tmp_path / "x.gguf").tensor(name), array)


def test_a_converted_llama_has_its_original_weights_and_config(tmp_path: Path) -> None:
    loaded = load_weights(str(gguf_of_tiny_llama(tmp_path)))
    original = load_weights(str(tmp_path / "hf"))
    assert loaded.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(tensor, original.tensors[name]) for name, tensor in loaded.tensors.items())
    assert loaded.config.linear_shapes() == original.config.linear_shapes()
    assert loaded.config.max_context_tokens == 512
    assert not loaded.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_quantized_llama_is_bit_identical_to_transformers_load(kind: str, tmp_path: Path) -> None:
    file = gguf_of_tiny_llama(tmp_path, QUANTIZATION[kind])
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected = dict(oracle.named_parameters())
    loaded = load_weights(str(file)).tensors
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.slow
def test_the_embedded_model_is_bit_identical_to_transformers_load() -> None:
    file = find_embedded()
    oracle = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = dict(oracle.named_parameters())
    loaded = load_weights(str(file)).tensors
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_the_embedded_model_is_smollm2() -> None:
    loaded = load_weights(str(find_embedded()))
    config = loaded.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_context_tokens, config.rope_theta) == (49_152, 8192, 100_000.0)
    assert (config.eos_token_ids, config.bos_token_id, config.tie_word_embeddings) == ((2,), 1, True)
    assert config.num_parameters == sum(tensor.numel() for tensor in loaded.tensors.values()) == 134_515_008
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: got 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor: got 0.5"),
        ({"llama.attention.head_count_kv": 3}, "must be a multiple of num_key_value_heads 3"),
    ],
)
def test_a_llama_that_the_decoder_would_compute_wrongly_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = gguf_of_tiny_llama(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_weights(str(file))
    assert str(file) in str(caught.value)


def test_missing_metadata_and_foreign_architectures_are_named(tmp_path: Path) -> None:
    bare = write_gguf(tmp_path / "bare.gguf", {}, {})
    with pytest.raises(ModelError, match=r"bare\.gguf: metadata 'llama\.embedding_length' is missing"):
        load_weights(str(bare))
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="GGUF architecture 'mamba' is not supported; supported: 'llama'"):
        load_weights(str(tmp_path / "mamba.gguf"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    metadata = {f"llama.{key}": value for key, value in LLAMA_METADATA.items()}
    norm = {"output_norm.weight": (np.ones(64, np.float32), QUANTIZATION.F32)}
    with pytest.raises(ModelError, match=r"bare\.gguf: tensor 'token_embd\.weight' is missing"):
        load_weights(str(write_gguf(tmp_path / "bare.gguf", norm, metadata)))
    norm["token_embd.weight"] = (np.ones((384, 64), np.float32), QUANTIZATION.F32)
    with pytest.raises(ModelError, match=r"part\.gguf: tensor 'model\.layers\.0.*' is missing"):
        load_weights(str(write_gguf(tmp_path / "part.gguf", norm, metadata)))


def test_an_unsupported_encoding_is_named_with_its_tensor(tmp_path: Path) -> None:
    array = np.ones((2, 256), np.float32)
    file = write_gguf(tmp_path / "x.gguf", {"x": (array, QUANTIZATION.Q5_0)}, {})
    with pytest.raises(
        ModelError, match=r"tensor 'x': encoding 6 is not supported; supported: F32 \(0\), .*Q4_1 \(3\)"
    ):
        GgufFile(file).tensor("x")


def test_every_truncation_of_a_file_is_an_error_and_no_crash(tmp_path: Path) -> None:
    array = np.ones((2, 32), np.float32)
    file = write_gguf(tmp_path / "x.gguf", {"x": (array, QUANTIZATION.F32)}, {"d": "text", "f": ["x", "y"]})
    content = file.read_bytes()
    for length in range(len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"x\.gguf: "):
            GgufFile(file).tensor("x")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version: got 1; supported: 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(60), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ4sIIQ", 3, 0, 1, 4, b"list", 9, 4, 2**61), "damaged"),
        (b"", "damaged GGUF header"),
    ],
)
def test_what_is_no_gguf_file_is_refused(head: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(head)
    with pytest.raises(ModelError, match=message):
        GgufFile(file)
