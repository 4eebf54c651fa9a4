"""Weights from directories and from the hub, against transformers, and everything that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import TINY_KINDS, TinyKind, make_tiny_model
from tuft.errors import ModelError
from tuft.models.load import load_weights


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_weights_are_those_that_transformers_loads(kind: TinyKind, tmp_path: Path) -> None:
    directory = make_tiny_model(kind, tmp_path)
    expected = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    weights = load_weights(str(directory))

    assert weights.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.tensors.items())
    assert "lm_head.weight" not in weights.tensors or not weights.config.tie_word_embeddings


def test_sharded_weights_are_the_same_as_whole_ones(tmp_path: Path) -> None:
    whole = load_weights(str(make_tiny_model("qwen3", tmp_path / "whole")))
    sharded_dir = make_tiny_model("qwen3", tmp_path / "sharded", max_shard_size="100KB")
    sharded = load_weights(str(sharded_dir))

    assert len(list(sharded_dir.glob("*.safetensors"))) > 2
    assert sharded.config == whole.config
    assert all(torch.equal(tensor, sharded.tensors[name]) for name, tensor in whole.tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_keep_the_dtype_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = load_weights(str(make_tiny_model("llama", tmp_path, dtype=dtype)))
    assert {tensor.dtype for tensor in weights.tensors.values()} == {dtype}


def test_end_of_sequence_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    edit_json(directory / "generation_config.json", eos_token_id=[0, 2])
    assert load_weights(str(directory)).config.eos_token_ids == (2, 0)


def test_the_context_limit_is_lowered_on_demand(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    assert load_weights(str(directory), max_context_tokens=64).config.max_context_tokens == 64


def test_a_tied_model_ignores_a_saved_head_and_old_rotary_buffers(tmp_path: Path) -> None:
    directory = make_tiny_model("llama-tied", tmp_path)
    edit_tensors(
        directory,
        lambda tensors: tensors.update(
            {"lm_head.weight": torch.zeros(384, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        ),
    )
    weights = load_weights(str(directory))
    assert weights.tensors.keys() == weights.config.tensor_shapes().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda tensors: tensors.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}),
            r"'model.norm.weight': got shape \(63,\); config says \(64,\)",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "'model.norm.weight': got torch.int8",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "'model.layers.0.self_attn.q_proj.bias' has no place in LlamaForCausalLM",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_checkpoint(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    directory = make_tiny_model("llama", tmp_path)
    edit_tensors(directory, change)
    with pytest.raises(ModelError, match=message) as caught:
        load_weights(str(directory))
    assert str(directory) in str(caught.value)


def test_a_refused_config_is_named_with_its_file(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    edit_json(directory / "config.json", hidden_act="relu")
    with pytest.raises(ModelError, match=r"config\.json: hidden_act: got 'relu'"):
        load_weights(str(directory))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        load_weights(str(directory))
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        load_weights(str(directory))
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json: got a list; must be a JSON object"):
        load_weights(str(directory))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path, max_shard_size="100KB")
    lost = min(directory.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name}: missing, though model.safetensors.index.json names it"):
        load_weights(str(directory))


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors are read"):
        load_weights(str(directory))
