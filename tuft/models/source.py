"""Where a base model lies on this machine: a GGUF file, a directory, or a snapshot of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from tuft.errors import ModelError

# model*.safetensors: some repositories hold the same weights again as consolidated.safetensors
_SNAPSHOT_PATTERNS = ("*.json", "model*.safetensors", "merges.txt", "*.jinja")


def resolve_source(path: str) -> Path:
    """The GGUF file or the directory with config.json that ``path`` names; a hub id is downloaded if it is not cached.

    Raises ModelError if there is none.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise ModelError(f"{local}: not a GGUF file; give a .gguf file, a directory with config.json, or a hub id")
        return local
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"{local}: has no config.json; give a directory of a Hugging Face model, or a .gguf file")
        return local
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or local.suffix.lower() == ".gguf":
        raise ModelError(f"{local}: no such file or directory")
    return _download_snapshot(path)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if it cannot be read or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: got a {type(content).__name__}; must be a JSON object")
    return content


def _download_snapshot(hub_id: str) -> Path:
    advice = "set the base model's `path` to a local directory, or HF_ENDPOINT to a hub that this machine can reach"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_SNAPSHOT_PATTERNS)))
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id}: the hub asks for permission to read it; accept its licence and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{hub_id}: neither a local directory nor a model on the hub; {advice}") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{hub_id}: cannot be fetched from the hub ({error}); {advice}") from error
