"""The tokenizers of this server's base models, as a Hugging Face hub serves files.

With ``HF_ENDPOINT=<this server>`` the SDK's ``get_tokenizer()`` needs no network beyond us. Public, since the hub's
client sends no key of ours; only the tokenizer's own files exist here, by exact name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

from tuft.api.auth import Served
from tuft.errors import InvalidInput
from tuft.service.services import Services

router = APIRouter(tags=["hub"])

SERVED_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of one base model; ``commit`` is a digest of them all."""

    files: Mapping[str, Path]
    digests: Mapping[str, str]
    commit: str


# Reading and digesting files takes a while: FastAPI runs these plain functions in threads.


@router.head("/{name:path}/resolve/{revision}/{file}")
@router.get("/{name:path}/resolve/{revision}/{file}")
def resolve(name: str, revision: str, file: str, services: Served) -> FileResponse:
    repository = _repository(services, name, revision)
    path = repository.files.get(file)
    if path is None:
        raise _not_found("EntryNotFound", f"{name} has no file {file!r}", repository.commit)
    return FileResponse(
        path,
        headers={"ETag": f'"{repository.digests[file]}"', "X-Repo-Commit": repository.commit},
        media_type="application/octet-stream",
    )


@router.get("/api/models/{name:path}/tree/{revision}")
def tree(name: str, revision: str, services: Served) -> list[dict[str, Any]]:
    repository = _repository(services, name, revision)
    return [
        {"type": "file", "path": file, "size": path.stat().st_size, "oid": repository.digests[file]}
        for file, path in repository.files.items()
    ]


@router.get("/api/models/{name:path}/tree/{revision}/{folder:path}")
def subtree(name: str, revision: str, folder: str, services: Served) -> None:
    """No tokenizer here has folders."""
    raise _not_found("EntryNotFound", f"{name} has no folder {folder!r}", _repository(services, name, revision).commit)


@router.get("/api/models/{name:path}")  # matched last: decorators apply from below
@router.get("/api/models/{name:path}/revision/{revision}")
def describe(name: str, services: Served, revision: str = "main") -> dict[str, Any]:
    repository = _repository(services, name, revision)
    return {
        "id": name,
        "modelId": name,
        "sha": repository.commit,
        "private": False,
        "tags": [],
        "siblings": [{"rfilename": file} for file in repository.files],
    }


def _repository(services: Services, name: str, revision: str) -> Repository:
    """Raises what the hub's client takes for a repository or revision that does not exist; ModelError while the models
    are loading."""
    try:
        model = services.models.require(name)
    except InvalidInput as error:
        raise _not_found("RepoNotFound", str(error)) from error
    files = {
        path.name: path
        for path in sorted(Path(model.tokenizer_dir).iterdir())
        if path.name in SERVED_FILES and path.is_file()
    }
    digests = {}
    for file, path in files.items():
        status = path.stat()
        digests[file] = _digest(path, status.st_mtime_ns, status.st_size)
    commit = hashlib.sha1(repr(digests).encode(), usedforsecurity=False).hexdigest()
    if revision not in ("main", commit):
        raise _not_found("RevisionNotFound", f"{name} has no revision {revision!r}; there is 'main'")
    return Repository(files, digests, commit)


@lru_cache(maxsize=256)
def _digest(path: Path, _mtime_ns: int, _size_bytes: int) -> str:
    """SHA-1 of a file, as the hub names contents; anew when the file has changed."""
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def _not_found(code: str, message: str, commit: str | None = None) -> HTTPException:
    headers = {"X-Error-Code": code}
    if commit is not None:
        headers["X-Repo-Commit"] = commit  # lets the hub's client remember that the file is missing
    return HTTPException(404, message, headers=headers)
