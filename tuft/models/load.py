"""Base weights from wherever they are: a GGUF file, a directory of safetensors, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tuft.errors import ModelError
from tuft.models.architecture import DecoderConfig, token_ids
from tuft.models.gguf import GgufFile
from tuft.models.source import read_json, resolve_source

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # old Llama checkpoints hold what the config already says


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """``tensors``: exactly the names and shapes of ``config.tensor_shapes()``, on the CPU. Safetensors keep their
    dtype and are memory-mapped, so that nothing is copied until the decoder casts; GGUF becomes float32."""

    config: DecoderConfig
    tensors: Mapping[str, torch.Tensor]


def load_weights(path: str, max_context_tokens: int | None = None) -> LoadedWeights:
    """Load the weights of ``path``: a GGUF file, a directory with config.json and safetensors, or a hub id.

    ``max_context_tokens`` lowers the model's own limit. Raises ModelError that names the file, and the option or
    tensor, that is missing, wrong or not supported.
    """
    source = resolve_source(path)
    if source.is_file():
        return _load_gguf(source, max_context_tokens)
    config_file = source / "config.json"
    config_json = read_json(config_file)
    generation_file = source / "generation_config.json"
    if generation_file.is_file():
        eos = (*token_ids(config_json.get("eos_token_id")), *token_ids(read_json(generation_file).get("eos_token_id")))
        config_json["eos_token_id"] = list(dict.fromkeys(eos))
    try:
        config = DecoderConfig.from_hf(config_json, max_context_tokens)
    except ModelError as error:
        raise ModelError(f"{config_file}: {error}") from error
    tensors = {}
    for file in _safetensors_files(source):
        tensors.update(_read_safetensors(file))
    return LoadedWeights(config, _checked(source, config, tensors))


def _load_gguf(file: Path, max_context_tokens: int | None) -> LoadedWeights:
    gguf = GgufFile(file)
    try:
        config = DecoderConfig.from_hf(gguf.hf_config(), max_context_tokens)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    tensors = {name: torch.from_numpy(tensor) for name, tensor in gguf.hf_tensors()}
    return LoadedWeights(config, _checked(file, config, tensors))


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise ModelError(f"{directory}: has neither {single.name} nor {index.name}; only safetensors are read")
        return [single]
    files = sorted({directory / name for name in read_json(index)["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: missing, though {index.name} names it")
    return files


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


def _checked(source: Path, config: DecoderConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the decoder needs, or ModelError: every one must be there, of the right shape, and no other,
    since a tensor without a place in the decoder means that it would compute something else."""
    shapes = config.tensor_shapes()
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelError(f"{source}: tensor {name!r} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"{source}: tensor {name!r}: got shape {tuple(tensors[name].shape)}; config says {shape}")
        if tensors[name].dtype not in _DTYPES:
            raise ModelError(f"{source}: tensor {name!r}: got {tensors[name].dtype}; must be one of {_DTYPES}")
    for name in tensors.keys() - shapes.keys():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if not tied and not name.endswith(_IGNORED_SUFFIXES):
            raise ModelError(f"{source}: tensor {name!r} has no place in {config.architecture}")
    return {name: tensors[name] for name in shapes}
