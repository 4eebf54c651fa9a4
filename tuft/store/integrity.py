"""Whether what was saved is still there, byte for byte.

``manifest.json`` names every other file of a directory with its size and SHA-256; the checkpoint's row keeps the
SHA-256 of the manifest. What an older server saved has no digest in its row, and its external checkpoints have no
manifest: those are checked by what they have.

Two depths: ``check_present`` reads the manifest and asks the file system for names and sizes; ``read_through`` reads
every byte, in parts, so that whoever drives it sets the pace.
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tuft.errors import Damaged, StorageError
from tuft.store.age import SUFFIX
from tuft.store.confined import confined

ADAPTER, CONFIG, COMPLETE = "adapter_model.safetensors", "adapter_config.json", "checkpoint_complete"
"""What is handed out; clients look for the last to know that they have everything."""
OPTIMIZER, MANIFEST = "optimizer.safetensors", "manifest.json"

_PART_BYTES = 2**22
_MAX_MANIFEST_BYTES = 2**20
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}
"""What says something of this process, and nothing of the file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a row says of its files: ``directory`` below the root, ``digest`` of the manifest or None."""

    directory: str
    digest: str | None
    size_bytes: int


def check_present(root: Path, stored: Stored, *, without: frozenset[str] = frozenset()) -> Mapping[str, Any]:
    """The manifest (empty if there is none), after every file of it but those ``without`` was found in its size.

    Raises Damaged naming the file, or StorageError if the disk does not answer.
    """
    path = confined(root, stored.directory)
    manifest = _manifest(root, stored)
    if not manifest:
        _check_without_manifest(root, stored)
        return manifest
    for name, entry in manifest["files"].items():
        if name in without:
            continue
        size = _size(path / name, stored)
        if size != entry["size"]:
            raise Damaged(f"{_named(stored, name)} has {size} bytes, not the {entry['size']} of its manifest")
    return manifest


def read_through(root: Path, stored: Stored, *, without: frozenset[str] = frozenset()) -> Iterator[int]:
    """The same, and every file's SHA-256 but those ``without``. Yields the number of bytes after each part read."""
    manifest = check_present(root, stored, without=without)
    for name, entry in manifest.get("files", {}).items():
        if name in without:
            continue
        digest = hashlib.sha256()
        try:
            with (root / stored.directory / name).open("rb", buffering=0) as file:
                while part := file.read(_PART_BYTES):
                    digest.update(part)
                    yield len(part)
        except OSError as error:
            raise _unreadable(root, stored, name, error) from error
        if digest.hexdigest() != entry["sha256"]:
            raise Damaged(f"{_named(stored, name)} is damaged: its SHA-256 is not the one of its manifest")


def sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(root: Path, stored: Stored) -> dict[str, Any]:
    path = root / stored.directory
    is_older = stored.digest is None and not (path / MANIFEST).exists()
    if is_older and any((path / f"{COMPLETE}{suffix}").exists() for suffix in ("", SUFFIX)):
        return {}
    _size(path / MANIFEST, stored)
    try:
        with (path / MANIFEST).open("rb") as file:
            content = file.read(_MAX_MANIFEST_BYTES)
    except OSError as error:
        raise _unreadable(root, stored, MANIFEST, error) from error
    if stored.digest is not None and hashlib.sha256(content).hexdigest() != stored.digest:
        raise Damaged(f"{_named(stored, MANIFEST)} is damaged: its SHA-256 is not the one that the database has")
    try:
        manifest = json.loads(content)
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
        if any("/" in name or name.startswith(".") for name, _, _ in entries):
            raise ValueError("a file's name is not plain")
        if not {ADAPTER, f"{ADAPTER}{SUFFIX}"} & manifest["files"].keys():
            raise ValueError("it names no adapter")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{_named(stored, MANIFEST)} is damaged: {error}") from error
    assert isinstance(manifest, dict)
    return manifest


def _check_without_manifest(root: Path, stored: Stored) -> None:
    """External weights of an older server: three files, as large together as the row says."""
    path = root / stored.directory
    suffix = "" if (path / COMPLETE).exists() else SUFFIX
    size_bytes = sum(_size(path / f"{name}{suffix}", stored) for name in (ADAPTER, CONFIG, COMPLETE))
    if size_bytes != stored.size_bytes:
        raise Damaged(f"{stored.directory} has {size_bytes} bytes, not the {stored.size_bytes} that were saved")
    if suffix:
        return
    try:
        json.loads((path / CONFIG).read_bytes())
        with safe_open(path / ADAPTER, framework="np"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise Damaged(f"{stored.directory} is damaged: {error}") from error


def _size(path: Path, stored: Stored) -> int:
    try:
        status = path.lstat()
    except OSError as error:
        raise _unreadable(path.parents[len(Path(stored.directory).parts)], stored, path.name, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{_named(stored, path.name)} is not a plain file")
    return status.st_size


def _unreadable(root: Path, stored: Stored, name: str, error: OSError) -> StorageError:
    """Damaged, unless the cause lies elsewhere: in this process, or in a disk that is not mounted."""
    if not root.is_dir():
        return StorageError(f"the directory of all checkpoints, {root.name!r} in the server's home, is not there")
    kind = StorageError if error.errno in _PASSING else Damaged
    return kind(f"{_named(stored, name)} cannot be read: {error.strerror}")


def _named(stored: Stored, name: str) -> str:
    """The file as messages call it: without the home, which is nobody's business but the operator's."""
    return f"{stored.directory}/{name}"
