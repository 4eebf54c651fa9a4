"""The engine as the service has it: a process of its own behind a mailbox, restarted when it dies. No torch here.

Two threads serve each life of the process: one writes batches to it (a batch can be tens of megabytes, and nobody who
submits one waits for the pipe), one reads its replies and, when they end, buries it and starts the next.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import tuft
from tuft.engine.base import BaseModelSource, Command, EngineSettings
from tuft.engine.mailbox import Batch, LoadFailed, Mailbox, Ready, Reply, Setup
from tuft.errors import EngineDied, EngineError, TuftError
from tuft.types import BaseModelInfo

_MAX_FAILED_STARTS = 4
_FIRST_PAUSE_S = 0.25
_EXIT_TIMEOUT_S = 5.0
_CLOSED = "the engine was closed"
_ADVICE = (
    "It starts again by itself. If this repeats, the machine may be short of memory: lower engine.micro_batch_tokens, "
    "engine.kv_cache_tokens or engine.max_decode_rows"
)
_log = logging.getLogger(__name__)


class EngineProcess:
    """Implements ``engine.base.Engine``. ``start`` returns at once; the engine is ready when ``base_models`` is not
    empty. When the process dies its work fails with EngineDied, ``generation`` grows and another one starts; it stays
    down, with ``error`` kept, if a base model cannot be loaded or several starts in a row end before it is ready."""

    def __init__(self, sources: Sequence[BaseModelSource], settings: EngineSettings) -> None:
        self._setup = Setup(tuple(sources), settings)
        self._changed = threading.Condition()  # guards everything below
        self._numbers = count()
        self._pending: dict[int, Future[Any]] = {}
        self._outbox: SimpleQueue[Batch | None] = SimpleQueue()
        self._generation = 0
        self._base_models: tuple[BaseModelInfo, ...] = ()
        self._pass_tokens = 0
        self._error: TuftError | None = None
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._mailbox: Mailbox | None = None
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)

    @property
    def base_models(self) -> tuple[BaseModelInfo, ...]:
        return self._base_models

    @property
    def pass_tokens(self) -> int:
        return self._pass_tokens

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def error(self) -> TuftError | None:
        """Why the engine is down and stays down; None while it runs or starts."""
        return self._error

    @property
    def pid(self) -> int | None:
        """Of the present process; None between two of them."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        self._generation = 1
        self._supervisor.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Raises what keeps the engine down, or EngineError if it is still loading after ``timeout_s`` (None: ever)."""
        with self._changed:
            self._changed.wait_for(lambda: self._base_models or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            if not self._base_models:
                raise EngineError(f"the engine is not ready after {timeout_s:g} s")

    def submit(self, batch: Sequence[Command]) -> list[Future[Any]]:
        """Never blocks: what cannot be sent yet is sent when the process is ready for it."""
        futures: list[Future[Any]] = [Future() for _ in batch]
        for future in futures:
            future.set_running_or_notify_cancel()  # from here on the engine will answer: cancelling changes nothing
        with self._changed:
            failure = self._error
            if failure is None:
                numbers = [next(self._numbers) for _ in batch]
                self._pending.update(zip(numbers, futures, strict=True))
                self._outbox.put(Batch(tuple(zip(numbers, batch, strict=True))))
        if failure is not None:
            for future in futures:
                future.set_exception(EngineDied(f"the engine is down: {failure}"))
        return futures

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._error = self._error or EngineError(_CLOSED)
            if self._mailbox is not None:
                self._mailbox.shut()  # the process ends when its mailbox does
            self._changed.notify_all()
        if self._supervisor.is_alive():
            self._supervisor.join()

    # --- the supervisor's thread --------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        num_failed = 0
        while True:
            reason, failure = self._live()
            num_failed = 0 if self._base_models else num_failed + 1
            with self._changed:
                if failure is not None and not isinstance(failure, EngineError):
                    self._error = self._error or failure  # the next start would meet the same
                elif num_failed == _MAX_FAILED_STARTS:
                    text = f"the engine failed to start {num_failed} times in a row; {failure or reason}"
                    self._error = self._error or EngineError(text)
            self._bury(reason)
            with self._changed:
                pause_s = _FIRST_PAUSE_S * 2**num_failed if num_failed else 0
                if self._changed.wait_for(lambda: self._error is not None, pause_s):
                    return

    def _live(self) -> tuple[str, TuftError | None]:
        """One life of the process: why it ended, and what kept it from loading."""
        ours, theirs = socket.socketpair()
        mailbox, failure = Mailbox(ours), None
        with theirs, self._changed:
            if self._is_closed:
                mailbox.close()
                return _CLOSED, None
            outbox, self._mailbox = self._outbox, mailbox
            process = self._process = _spawn(theirs)
        writer = threading.Thread(target=_write, args=(mailbox, self._setup, outbox), name="engine-writer", daemon=True)
        writer.start()
        for letter in _letters(mailbox):
            if isinstance(letter, LoadFailed):
                failure = letter.error
            else:
                self._take(letter)
        mailbox.shut()  # it ends when its mailbox does, if it has not yet
        outbox.put(None)
        status = _wait(process)
        writer.join()
        with self._changed:
            self._mailbox = None
            mailbox.close()
            return _CLOSED if self._is_closed else _told(status), failure

    def _take(self, letter: object) -> None:
        with self._changed:
            if isinstance(letter, Ready):
                self._base_models, self._pass_tokens = letter.base_models, letter.pass_tokens
                self._changed.notify_all()
            if not isinstance(letter, Reply):
                return
            future = self._pending.pop(letter.number)
        if isinstance(letter.result, TuftError):
            future.set_exception(letter.result)
        else:
            future.set_result(letter.result)

    def _bury(self, reason: str) -> None:
        """Fail what the process held, and open the mailbox of the next."""
        with self._changed:
            pending, self._pending = self._pending, {}
            self._outbox = SimpleQueue()
            self._base_models, self._process = (), None
            if self._error is None:
                self._generation += 1
            self._changed.notify_all()
            is_closed = self._is_closed
        if not is_closed:
            _log.error("%s; %d commands lost", reason, len(pending))
        for future in pending.values():
            future.set_exception(EngineDied(reason if is_closed else f"{reason} while it held this work. {_ADVICE}"))


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """A fresh interpreter, not a fork and not multiprocessing: it gets neither our threads nor the caller's script."""
    root = str(Path(tuft.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(  # noqa: S603 (our own interpreter and module)
        [sys.executable, "-P", "-m", "tuft.engine.process", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        # OpenMP's threads spin while they wait for each other: beside another busy process a step then takes many times
        # as long. Sleeping at once would halve the speed of decoding; a short spin costs neither (bench/RESULTS.md)
        env={"GOMP_SPINCOUNT": "1000", **os.environ, "PYTHONPATH": path},
    )


def _write(mailbox: Mailbox, setup: Setup, outbox: SimpleQueue[Batch | None]) -> None:
    try:
        mailbox.send(setup)
        while (batch := outbox.get()) is not None:
            mailbox.send(batch)
    except OSError:
        return  # the process is gone; the supervisor sees it too


def _letters(mailbox: Mailbox) -> Iterator[object]:
    while True:
        try:
            yield mailbox.receive()
        except EOFError:
            return


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit status; killed if it does not end by itself."""
    try:
        return process.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _told(status: int) -> str:
    if status < 0:
        return f"the engine process was ended by {signal.Signals(-status).name}"
    return f"the engine process ended with exit status {status}"
