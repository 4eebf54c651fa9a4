"""What the server writes to its terminal: no keys, no prompts, no paths but names, whoever logs it."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

from tuft import scrub
from tuft.errors import TuftError

Event = MutableMapping[str, Any]


def log_to_stderr(level: int) -> None:
    """Log events from ``level`` on, and warnings of the libraries below."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            scrubbed,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(ScrubbedLines("%(asctime)s [%(levelname)s] %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines], force=True)


def scrubbed(_logger: Any, _method: str, event: Event) -> Event:
    """A processor of structlog's. An exception becomes where it came from: its own renderer would show the variables
    of every frame."""
    if found := event.pop("exc_info", None):
        error = found if isinstance(found, BaseException) else sys.exc_info()[1]
        event["exception"] = "" if error is None else told(error)
    return {key: scrub.for_logs(value) if isinstance(value, str) else value for key, value in event.items()}


class ScrubbedLines(logging.Formatter):
    """The same for the libraries that log by ``logging``."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # its name there
        record.message = scrub.for_logs(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return told(ei[1])


def told(error: BaseException) -> str:
    """Where an error came from and what it is. What it says is left out unless it is one of ours: a library's may quote
    what it was working on."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(lines) < 100:
        lines.append(f"{type(cause).__name__}: {cause.told}" if isinstance(cause, TuftError) else type(cause).__name__)
        lines += [f"  {_place(frame)}" for frame in traceback.extract_tb(cause.__traceback__)]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(lines)


def _place(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} in {frame.name}"
