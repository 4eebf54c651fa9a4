"""How kernels come to the decoders: compiled by another process, loaded from the cache, or not at all."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.engine.reference import CPU
from tests.models.tiny import make_tiny_model
from tuft.engine.kernels import KernelUpgrade
from tuft.models.compiled import CompiledOps
from tuft.models.decoder import Decoder
from tuft.models.kernels import build
from tuft.models.load import load_weights
from tuft.models.ops import EagerOps


@pytest.fixture(autouse=True)
def _numba_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", os.environ["NUMBA_CACHE_DIR"])  # loading kernels changes it


@pytest.fixture
def decoder() -> Decoder:
    with TemporaryDirectory() as directory:
        return Decoder(load_weights(str(make_tiny_model("llama", Path(directory)))), "float32", CPU)


def test_without_a_cache_there_are_no_kernels(decoder: Decoder) -> None:
    upgrade = KernelUpgrade([decoder], None, wait=True)
    upgrade.poll()
    assert not upgrade.is_pending
    assert isinstance(decoder.ops, EagerOps)


def test_kernels_in_the_cache_are_there_at_once(decoder: Decoder, tmp_path: Path) -> None:
    build.load(tmp_path)
    upgrade = KernelUpgrade([decoder], str(tmp_path), wait=False)
    assert not upgrade.is_pending
    assert isinstance(decoder.ops, CompiledOps)


@pytest.mark.slow
def test_missing_kernels_are_compiled_elsewhere_while_torch_computes(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real cold start, and what another version has left in the cache."""
    monkeypatch.setattr(build, "_LOW_PRIORITY", 0)  # nobody else is to come first, or this takes twice as long
    (tmp_path / "of another version").mkdir()
    upgrade = KernelUpgrade([decoder], str(tmp_path), wait=False)
    assert upgrade.is_pending
    assert isinstance(decoder.ops, EagerOps)
    deadline = time.monotonic() + 200
    while upgrade.is_pending and time.monotonic() < deadline:
        upgrade.poll()
        time.sleep(0.1)
    assert isinstance(decoder.ops, CompiledOps)
    assert list(tmp_path.iterdir()) == [build.directory_of(tmp_path)]


def test_a_cache_that_cannot_be_used_is_said_and_torch_goes_on(
    decoder: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "kernels"
    cache.touch()  # a file where the directory should be
    with caplog.at_level(logging.WARNING):
        upgrade = KernelUpgrade([decoder], str(cache), wait=False)
        deadline = time.monotonic() + 60
        while upgrade.is_pending and time.monotonic() < deadline:
            upgrade.poll()
            time.sleep(0.05)
    assert isinstance(decoder.ops, EagerOps)
    (record,) = [record for record in caplog.records if record.name.startswith("tuft")]
    assert "compiling kernels failed" in record.getMessage()
    assert "Computing with torch's operators" in record.getMessage()
    assert "Not a directory" in capfd.readouterr().err


def test_the_compiling_process_ends_with_the_one_that_wants_it(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from tuft.models.kernels.build import Build; b = Build(Path({str(tmp_path)!r})); "
    )
    code += "print(b._process.pid, flush=True); import os; os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    process = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists() and _state(process) != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists() or _state(process) == "Z"
    assert not (build.directory_of(tmp_path) / "complete").exists()


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
