"""Adapters on disk, in PEFT's own format: ``peft.PeftModel.from_pretrained(base, directory)`` reads them.

    <directory>/
      adapter_model.safetensors   the LoRA matrices, float32
      adapter_config.json         PEFT's LoraConfig
      optimizer.safetensors       exp_avg/…, exp_avg_sq/…, gradients/… (training checkpoints alone)
      manifest.json               LoRA choices, optimizer, its step, and the size and SHA-256 of every file above

An external checkpoint holds the first two and an empty ``checkpoint_complete``, each perhaps encrypted (``.age``), and
a manifest of their sizes and digests alone.

A directory appears under its name only when it is whole: it is written beside it, synced, read back from the disk,
renamed, and its parents are synced. Whoever made it then puts its digest into a row (``store.integrity``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tuft.errors import Damaged, StorageError
from tuft.store.age import SUFFIX, encrypt
from tuft.store.confined import confined, plain_file
from tuft.store.integrity import (
    ADAPTER,
    COMPLETE,
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    Stored,
    check_present,
    read_through,
    sha256,
)
from tuft.types import LORA_ALPHA, AdapterState, Float32Array, LoraSpec

_HANDED_OUT = {ADAPTER, CONFIG, COMPLETE}
_PARTIAL = ".partial-"
_FILE_BYTES, _TENSOR_BYTES = 2**14, 512
"""What a file takes beside its tensors, and a tensor beside its numbers, at most."""
_OS_ERROR = re.compile(r"os error (\d+)")
"""How what is written in Rust tells of one; the rest of its message names the file."""
_SETTLED = timedelta(hours=1)
"""A directory that has waited so long for a row will not get one."""


class Written(NamedTuple):
    """``size_bytes`` of what was saved; ``digest`` is the SHA-256 of its manifest."""

    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Orphan:
    """A directory below the root that no row names: its save died before the row was written, or its deletion did."""

    directory: str
    size_bytes: int
    written_at: datetime


def write_adapter(
    root: Path, directory: str, state: AdapterState, base_model: str, *, min_free_bytes: int = 0
) -> Written:
    """Write ``state`` to ``root/directory`` (which must not exist).

    Raises StorageError, before anything is written if it would leave less than ``min_free_bytes`` of the disk free;
    nothing stays under the name then, nor beside it.
    """

    def fill(partial: Path) -> dict[str, Any]:
        _write_peft(partial, state, base_model)
        if state.exp_avg:
            save_file(_optimizer_tensors(state), partial / OPTIMIZER)
        return {"base_model": base_model, "lora": asdict(state.spec), "optimizer": state.optimizer, "step": state.step}

    needed_bytes = _size_of(state.weights, state.exp_avg, state.exp_avg_sq, state.gradients)
    written, manifest_bytes = _write(root, directory, needed_bytes, min_free_bytes, fill)
    return written._replace(size_bytes=written.size_bytes + manifest_bytes)


def write_external(
    root: Path,
    directory: str,
    state: AdapterState,
    base_model: str,
    recipients: Sequence[str] | None,
    *,
    min_free_bytes: int = 0,
) -> Written:
    """The same for PEFT's files alone, encrypted to ``recipients`` if there are any. Its size is what is handed out."""

    def fill(partial: Path) -> dict[str, Any]:
        _write_peft(partial, state, base_model)
        (partial / COMPLETE).touch()
        if recipients is not None:
            for path in list(partial.iterdir()):
                encrypt(path, recipients)
        return {}

    needed_bytes = _size_of(state.weights) * (1 if recipients is None else 2)  # for a while, plain and encrypted
    return _write(root, directory, needed_bytes, min_free_bytes, fill)[0]


def read_adapter(root: Path, directory: str, *, with_optimizer: bool, digest: str | None = None) -> AdapterState:
    """The adapter saved under ``root/directory``, after its files were checked against the manifest, and that against
    ``digest`` if it is known.

    Raises Damaged naming the file that is missing or not what was written; StorageError if the disk does not answer.
    """
    path = root / directory
    stored = Stored(directory, digest, 0)
    left_out = frozenset() if with_optimizer else frozenset({OPTIMIZER})
    manifest = check_present(root, stored, without=left_out)
    for _ in read_through(root, stored, without=left_out):
        pass
    try:
        weights = load_file(path / ADAPTER)
        optimizer = load_file(path / OPTIMIZER) if with_optimizer and OPTIMIZER in manifest["files"] else {}
        return AdapterState(
            spec=LoraSpec(**manifest["lora"]),
            weights=weights,
            exp_avg=_part(optimizer, "exp_avg"),
            exp_avg_sq=_part(optimizer, "exp_avg_sq"),
            gradients=_part(optimizer, "gradients"),
            step=manifest["step"] if optimizer else 0,
            optimizer=manifest.get("optimizer", "adamw"),  # those of an older server do not say
        )
    except OSError as error:
        raise StorageError(f"{directory} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"{directory} is damaged: {error}") from error


def files_to_hand_out(root: Path, directory: str) -> dict[str, Path]:
    """The files under ``root/directory`` that its readers may download, by name. Raises StorageError."""
    try:
        paths = sorted(confined(root, directory).iterdir())
        found = {path.name: path for path in paths if path.name.removesuffix(SUFFIX) in _HANDED_OUT}
        for path in found.values():
            plain_file(path)
    except OSError as error:
        raise StorageError(f"{directory} cannot be read: {error.strerror}") from error
    return found


def delete_adapter(root: Path, directory: str) -> None:
    """Whoever has its files open reads on. Of a deletion that dies half-way the sweep deletes the rest."""
    with suppress(OSError, Damaged):
        doomed = confined(root, directory)
        shutil.rmtree(doomed.rename(doomed.with_name(f"{_PARTIAL}{doomed.name}-{token_hex(4)}")), ignore_errors=True)


def sweep(root: Path) -> int:
    """Delete what a writer left half-written when it died; returns how many. Whole adapters stay, named or not: the
    database that knew them may have been moved, and may come back."""
    partial = list(root.glob(f"**/{_PARTIAL}*"))
    for path in partial:
        shutil.rmtree(path, ignore_errors=True)
    return len(partial)


def find_orphans(root: Path, named: Callable[[], Collection[str]]) -> list[Orphan]:
    """Directories without a row, an hour after they were written at the earliest: safe beside a server that saves."""
    found = [path for path in root.glob("*/*/*") if path.is_dir() and not path.name.startswith(_PARTIAL)]
    known = named()  # asked afterwards: what got its row meanwhile is no orphan
    orphans = []
    for path in sorted(found):
        directory = str(path.relative_to(root))
        if directory in known:
            continue
        with suppress(OSError):  # deleted meanwhile
            written_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            if written_at < datetime.now(UTC) - _SETTLED:
                orphans.append(Orphan(directory, sum(file.lstat().st_size for file in path.iterdir()), written_at))
    return orphans


def _write(
    root: Path, directory: str, needed_bytes: int, min_free_bytes: int, fill: Callable[[Path], dict[str, Any]]
) -> tuple[Written, int]:
    """``fill`` a directory that takes its name when all of it is on the disk; also returns the manifest's bytes."""
    final = root / directory
    place = final.with_name(f"{_PARTIAL}{final.name}-{token_hex(4)}")
    is_done = False
    try:
        _require_space(root, needed_bytes, min_free_bytes)
        place.mkdir(parents=True)
        about = fill(place)
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(place.iterdir())}
        manifest = json.dumps({**about, "files": files}, indent=2).encode()
        (place / MANIFEST).write_bytes(manifest)
        size_bytes = sum(path.stat().st_size for path in place.iterdir()) - len(manifest)
        written = Written(size_bytes, hashlib.sha256(manifest).hexdigest())
        for path in (*place.iterdir(), place):
            _sync(path)
        for _ in read_through(place.parent, Stored(place.name, written.digest, size_bytes)):
            pass
        place = place.rename(final)
        for parent in final.parents[: len(final.relative_to(root).parts)]:
            _sync(parent)
        is_done = True
    except (OSError, SafetensorError, StorageError) as error:
        raise StorageError(
            f"{root.name}/{directory} could not be written: {_reason(root, needed_bytes, error)}"
        ) from error
    finally:
        if not is_done:
            shutil.rmtree(place, ignore_errors=True)
    return written, len(manifest)


class _DiskFull(StorageError):
    pass


def _require_space(root: Path, needed_bytes: int, min_free_bytes: int) -> None:
    """Before a byte is written. Raises StorageError."""
    if needed_bytes + min_free_bytes > _free_bytes(root):
        kept = f" (the last {min_free_bytes:,} bytes are kept free)" if min_free_bytes else ""
        raise _DiskFull(f"the disk is full{kept}")


def _reason(root: Path, needed_bytes: int, error: Exception) -> str:
    """What went wrong, in words that name no path of the server's, and what to do."""
    found = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    said = str(error).replace(f"{root}/", "") if number is None else os.strerror(number)
    if not isinstance(error, _DiskFull) and number not in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; nothing of it was kept: save again, or look at the server's disk"
    try:
        free = f"{_free_bytes(root):,}"
    except OSError:
        free = "an unknown number"
    return (
        f"{said}: it needs about {needed_bytes:,} bytes, and {free} are free in the server's {root.name!r} directory; "
        "delete checkpoints or make room there, then save again"
    )


def _free_bytes(root: Path) -> int:
    place = root
    while not place.exists():
        place = place.parent
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize


def _size_of(*tensors: Mapping[str, Float32Array]) -> int:
    """Of files with these tensors, at most."""
    num_bytes = sum(array.nbytes + _TENSOR_BYTES for named in tensors for array in named.values())
    return num_bytes + 4 * _FILE_BYTES


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


def _sync(path: Path) -> None:
    """Onto the disk, and out of memory where the system can: whoever reads next reads from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
