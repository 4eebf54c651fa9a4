"""Compiling the kernels once and loading them ever after: ``python -m tuft.models.kernels.build DIRECTORY NICENESS``.

Compiling takes many seconds of one core, loading a fraction of one. So a process that must start at once has another
one compile, computes with torch's operators meanwhile, and loads the kernels when they are there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tuft.errors import EngineError

if TYPE_CHECKING:
    from tuft.models.ops import Ops

_COMPLETE = "complete"
_BUILD = (sys.executable, "-P", "-m", "tuft.models.kernels.build")
_HALVES = (
    ("attention", "attention_backward", "rows", "head"),
    ("lora_segments", "paged_attention", "decode_step", "lora_rows", "draw"),
)
"""Modules with kernels, in two parts that take as long and need nothing of each other: a process compiles each."""
_LOW_PRIORITY = 10


def directory_of(cache: Path) -> Path:
    """Where this source's kernels lie for this CPU: whatever could change the machine code is in the name."""
    import llvmlite.binding as llvm  # not at the head of the file: only processes that compute need it

    parts = [version("numba"), version("torch"), llvm.get_host_cpu_name(), str(Path(__file__).parent)]
    for file in sorted(Path(__file__).parent.glob("*.py")):
        parts += [file.name, str(file.stat().st_mtime_ns), file.read_text(encoding="utf-8")]
    return cache / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load(cache: Path) -> Ops:
    """The compiled operators, from ``cache``; what is not there is compiled now. Raises EngineError where the machine
    has no way to run them, or ``cache`` cannot be used."""
    try:
        directory = _use(cache)
        ops: Ops = import_module("tuft.models.compiled").CompiledOps()
        (directory / _COMPLETE).touch()
    except (ImportError, OSError, AttributeError) as error:
        raise EngineError(f"kernels cannot be compiled or loaded: {error}") from error
    return ops


class Build:
    """Kernels on their way: ``ready`` says when ``load`` is quick, having started a process that compiles if needed.
    ``in_background``: others compute meanwhile, and come first. Raises EngineError if no process can be started or
    ``cache`` cannot be read."""

    def __init__(self, cache: Path, in_background: bool = True) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if not (directory_of(cache) / _COMPLETE).exists():
                command = [*_BUILD, str(cache), str(_LOW_PRIORITY if in_background else 0)]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE)  # noqa: S603 (our own module)
        except (ImportError, OSError) as error:
            raise EngineError(f"kernels cannot be compiled or loaded: {error}") from error

    def ready(self) -> bool:
        """Raises EngineError if compiling failed."""
        status = 0 if self._process is None else self._process.poll()
        if status:
            raise EngineError(f"compiling kernels failed with exit status {status}, for the reason above")
        return status == 0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cache, niceness, *modules = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    os.nice(niceness)
    try:
        if modules:
            _compile(cache, modules)
            return
        if len(os.sched_getaffinity(0)) > 1:
            _compile_halves(cache)
        load(cache)
    except EngineError as error:
        sys.exit(str(error))
    for other in set(cache.iterdir()) - {directory_of(cache)}:
        shutil.rmtree(other, ignore_errors=True)  # of another version or another CPU


def _compile_halves(cache: Path) -> None:
    """All kernels, by this process and another beside it; what that could not do, ``load`` will."""
    first, second = _HALVES
    command = [*_BUILD, str(cache), "0", *second]  # as nice as this process
    beside = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603 (our own module)
    _compile(cache, first)
    beside.wait()


def _compile(cache: Path, modules: Sequence[str]) -> None:
    try:
        _use(cache)
        for name in modules:
            import_module(f"tuft.models.kernels.{name}")
    except (ImportError, OSError, AttributeError) as error:
        raise EngineError(f"kernels cannot be compiled or loaded: {error}") from error


def _use(cache: Path) -> Path:
    directory = directory_of(cache)
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["NUMBA_CACHE_DIR"] = str(directory)  # numba reads it when it is imported
    return directory


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: the interpreter cannot end while a thread holds its lock
    os._exit(1)


if __name__ == "__main__":
    main()
