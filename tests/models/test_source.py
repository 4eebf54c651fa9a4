"""Finding a base model: local paths, and a hub that cannot help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.tiny import make_tiny_model
from tuft.errors import ModelError
from tuft.models.source import resolve_source


def test_a_directory_and_a_gguf_file_are_found_where_they_are(tmp_path: Path) -> None:
    directory = make_tiny_model("llama", tmp_path / "model")
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert resolve_source(str(directory)) == directory
    assert resolve_source(str(gguf)) == gguf


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c", "model.gguf"])
def test_a_local_path_that_does_not_exist_is_no_hub_id(path: str) -> None:
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve_source(path)


def test_a_path_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_source(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_source(str(weights))


def resolve_with_hub(endpoint: str, hub_id: str, home: Path) -> str:
    """In a process of its own, since huggingface_hub reads its environment at import."""
    program = (
        "import sys; from tuft.models.source import resolve_source; from tuft.errors import ModelError\n"
        "try: resolve_source(sys.argv[1])\n"
        "except ModelError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    finished = subprocess.run(
        [sys.executable, "-c", program, hub_id], env=environment, capture_output=True, text=True, check=True
    )
    return finished.stdout


def test_an_unreachable_hub_says_how_to_do_without(tmp_path: Path) -> None:
    message = resolve_with_hub("http://127.0.0.1:9", "some/model", tmp_path)
    assert message.startswith("some/model: cannot be fetched from the hub")
    assert "HF_ENDPOINT" in message
    assert "`path` to a local directory" in message


def test_a_name_that_is_no_hub_id_says_so(tmp_path: Path) -> None:
    message = resolve_with_hub("http://127.0.0.1:9", "some model", tmp_path)
    assert message.startswith("some model: neither a local directory nor a model on the hub")
