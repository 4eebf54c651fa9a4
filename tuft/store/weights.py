"""Adapters on disk, in PEFT's own format: ``peft.PeftModel.from_pretrained(base, directory)`` reads them.

    <directory>/
      adapter_model.safetensors   the LoRA matrices, float32
      adapter_config.json         PEFT's LoraConfig
      optimizer.safetensors       exp_avg/…, exp_avg_sq/…, gradients/… (training checkpoints alone)
      manifest.json               LoRA choices, optimizer, its step, and the size and SHA-256 of every file above

An external checkpoint holds the first two and an empty ``checkpoint_complete``, each perhaps encrypted (``.age``).

A directory appears under its name only when it is complete: it is written beside it, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tuft.errors import StorageError
from tuft.store.age import encrypt
from tuft.types import LORA_ALPHA, AdapterState, Float32Array, LoraSpec

ADAPTER, CONFIG, COMPLETE = "adapter_model.safetensors", "adapter_config.json", "checkpoint_complete"
"""What is handed out; clients look for the last to know that they have everything."""
_OPTIMIZER, _MANIFEST = "optimizer.safetensors", "manifest.json"
_PARTIAL = ".partial-"


def write_adapter(root: Path, directory: str, state: AdapterState, base_model: str) -> int:
    """Write ``state`` to ``root/directory`` (which must not exist). Returns its size in bytes.

    Raises StorageError; nothing stays under the name then.
    """

    def fill(partial: Path) -> None:
        _write_peft(partial, state, base_model)
        if state.exp_avg:
            save_file(_optimizer_tensors(state), partial / _OPTIMIZER)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in partial.iterdir()}
        about = {"base_model": base_model, "lora": asdict(state.spec), "optimizer": state.optimizer, "step": state.step}
        manifest = {**about, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2))

    return _write(root / directory, fill)


def write_external(
    root: Path, directory: str, state: AdapterState, base_model: str, recipients: Sequence[str] | None
) -> int:
    """The same for PEFT's files alone, encrypted to ``recipients`` if there are any."""

    def fill(partial: Path) -> None:
        _write_peft(partial, state, base_model)
        (partial / COMPLETE).touch()
        if recipients is not None:
            for path in list(partial.iterdir()):
                encrypt(path, recipients)

    return _write(root / directory, fill)


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
        weights = load_file(path / ADAPTER)
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
        optimizer=manifest.get("optimizer", "adamw"),  # those of an older server do not say
    )


def files_to_hand_out(root: Path, directory: str) -> dict[str, Path]:
    """The files under ``root/directory`` that its readers may download, by name. Raises StorageError."""
    try:
        paths = sorted((root / directory).iterdir())
    except OSError as error:
        raise StorageError(f"checkpoint {root / directory} cannot be read: {error}") from error
    return {path.name: path for path in paths if path.name not in (_OPTIMIZER, _MANIFEST)}


def delete_adapter(root: Path, directory: str) -> None:
    shutil.rmtree(root / directory, ignore_errors=True)


def sweep(root: Path) -> int:
    """Delete what a writer left half-written when it died; returns how many. Whole adapters stay, named or not: the
    database that knew them may have been moved, and may come back."""
    partial = list(root.glob(f"**/{_PARTIAL}*"))
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return len(partial)


def _write(final: Path, fill: Callable[[Path], None]) -> int:
    """``fill`` a directory that takes its name when all of it is on the disk; returns its size in bytes."""
    partial = final.with_name(f"{_PARTIAL}{final.name}-{token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        size = sum(path.stat().st_size for path in partial.iterdir())
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError, StorageError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{final} could not be written: {error}; free some space, then save again") from error
    return size


def _write_peft(partial: Path, state: AdapterState, base_model: str) -> None:
    save_file(dict(state.weights), partial / ADAPTER, metadata={"format": "pt"})
    (partial / CONFIG).write_text(json.dumps(_peft_config(state, base_model), indent=2))


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
