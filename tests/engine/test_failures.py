"""Whatever is raised becomes an error that its caller can read."""

from __future__ import annotations

import pytest
import torch

from tuft.engine.failures import engine_error
from tuft.errors import EngineError, InvalidInput


def test_an_error_raised_on_purpose_is_passed_on_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    error = InvalidInput("prompt[0]", -1, "must be 0 to 9")
    assert engine_error(error, "sampling") is error
    assert capfd.readouterr().err == ""


def test_an_unexpected_error_is_told_with_its_text_and_its_traceback_goes_to_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    try:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    except RuntimeError as raised:
        error = engine_error(raised, "loss")
    assert isinstance(error, EngineError)
    assert str(error).startswith("loss: RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_lack_of_memory_says_what_to_lower(kind: type[Exception]) -> None:
    assert "lower engine.micro_batch_tokens, engine.kv_cache_tokens" in str(engine_error(kind("no"), "loss"))


def test_lack_of_memory_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert "out of memory; lower" in str(engine_error(caught.value, "sampling"))
