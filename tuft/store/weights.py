"""Adapters on disk, in PEFT's own format: ``peft.PeftModel.from_pretrained(base, directory)`` reads them.

    <directory>/
      adapter_model.safetensors   the LoRA matrices, float32
      adapter_config.json         PEFT's LoraConfig
      optimizer.safetensors       exp_avg/…, exp_avg_sq/…, gradients/… (training checkpoints alone)
      manifest.json               LoRA choices, optimizer step, and the size and SHA-256 of every file above

A directory appears under its name only when it is complete: it is written beside it, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tuft.errors import StorageError
from tuft.types import LORA_ALPHA, AdapterState, Float32Array, LoraSpec

_ADAPTER, _CONFIG, _OPTIMIZER, _MANIFEST = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "manifest.json",
)
_PARTIAL = ".partial-"


def write_adapter(root: Path, directory: str, state: AdapterState, base_model: str) -> int:
    """Write ``state`` to ``root/directory`` (which must not exist). Returns its size in bytes.

    Raises StorageError; nothing stays under the name then.
    """
    final = root / directory
    partial = final.with_name(f"{_PARTIAL}{final.name}-{token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        save_file(dict(state.weights), partial / _ADAPTER, metadata={"format": "pt"})
        (partial / _CONFIG).write_text(json.dumps(_peft_config(state, base_model), indent=2))
        if state.exp_avg:
            save_file(_optimizer_tensors(state), partial / _OPTIMIZER)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in partial.iterdir()}
        manifest = {"base_model": base_model, "lora": asdict(state.spec), "step": state.step, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        size = sum(path.stat().st_size for path in partial.iterdir())
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{final} could not be written: {error}; free some space, then save again") from error
    return size


def read_adapter(root: Path, directory: str, *, with_optimizer: bool) -> AdapterState:
    """The adapter saved under ``root/directory``, after its files were checked against the manifest.

    Raises StorageError naming the file that is missing or damaged.
    """
    path = root / directory
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        wanted = [name for name in manifest["files"] if with_optimizer or name != _OPTIMIZER]
        for name in wanted:
            if _sha256(path / name) != manifest["files"][name]["sha256"]:
                raise StorageError(f"{path / name} is damaged: its SHA-256 is not the one of its manifest")
        weights = load_file(path / _ADAPTER)
        optimizer = load_file(path / _OPTIMIZER) if _OPTIMIZER in wanted else {}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(f"checkpoint {path} cannot be read: {error}") from error
    return AdapterState(
        spec=LoraSpec(**manifest["lora"]),
        weights=weights,
        exp_avg=_part(optimizer, "exp_avg"),
        exp_avg_sq=_part(optimizer, "exp_avg_sq"),
        gradients=_part(optimizer, "gradients"),
        step=manifest["step"] if optimizer else 0,
    )


def delete_adapter(root: Path, directory: str) -> None:
    shutil.rmtree(root / directory, ignore_errors=True)


def sweep(root: Path) -> int:
    """Delete what a writer left half-written when it died; returns how many. Whole adapters stay, named or not: the
    database that knew them may have been moved, and may come back."""
    partial = list(root.glob(f"**/{_PARTIAL}*"))
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return len(partial)


def _optimizer_tensors(state: AdapterState) -> dict[str, Float32Array]:
    parts = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq, "gradients": state.gradients}
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def _part(optimizer: Mapping[str, Float32Array], part: str) -> dict[str, Float32Array]:
    return {name.removeprefix(f"{part}/"): array for name, array in optimizer.items() if name.startswith(f"{part}/")}


def _peft_config(state: AdapterState, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.spec.rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.split(".")[-3] for name in state.weights}),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
