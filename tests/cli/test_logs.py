"""What the terminal shows of what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from tuft.cli.logs import log_to_stderr
from tuft.errors import InvalidInput, StorageError

KEY = "tml-AbCdEf0123456789"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    handlers = logging.getLogger().handlers[:]
    yield
    structlog.reset_defaults()
    logging.getLogger().handlers = handlers


def fail(prompt: str) -> None:
    secret = KEY
    try:
        raise KeyError(prompt + secret)
    except KeyError as error:
        raise StorageError(f"/home/me/.tuft/a.json: {secret}") from error


def test_an_exception_is_logged_without_variables_messages_keys_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(logging.WARNING)
    for log in (structlog.get_logger("tuft.test"), logging.getLogger("uvicorn.error")):
        try:
            fail("a private prompt")
        except StorageError:
            log.exception("it failed")  # type: ignore[attr-defined]
        shown = capsys.readouterr().err
        assert "it failed" in shown
        assert "StorageError: …/a.json: tml-…" in shown
        assert "KeyError" in shown
        assert "tests/cli/test_logs.py" in shown
        assert " in fail" in shown
        for secret in ("private", KEY, "/home/me"):
            assert secret not in shown


def test_what_is_logged_of_a_refusal_is_the_field_and_not_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(logging.INFO)
    error = InvalidInput("sampling_params.stop", "a private stop", "must be shorter")
    structlog.get_logger("tuft.test").info("operation failed", run="s:train:0", seq=3, error=str(error))
    logging.getLogger("tuft").warning("%s; %s", error, KEY)
    shown = capsys.readouterr().err
    assert "s:train:0" in shown
    assert "sampling_params.stop: got" in shown
    assert "private" not in shown
    assert KEY not in shown
