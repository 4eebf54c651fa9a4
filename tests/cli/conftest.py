"""Commands as they are typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuft.cli import app
from tuft.errors import TuftError

Tuft = Callable[..., str]


@pytest.fixture
def tuft(tmp_path: Path) -> Tuft:
    """``tuft("key", "list")``: what it prints, with a home of the test's own. Raises what `tuft` would print as the
    error."""

    def run(*words: str, home: Path = tmp_path) -> str:
        done = CliRunner().invoke(app, [*words, "--home", str(home)])
        if isinstance(done.exception, TuftError):
            raise done.exception
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    return run
