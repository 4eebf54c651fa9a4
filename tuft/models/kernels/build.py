"""Compiling the kernels once and loading them ever after: ``python -m tuft.models.kernels.build DIRECTORY``.

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
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tuft.errors import EngineError

if TYPE_CHECKING:
    from tuft.models.ops import Ops

_COMPLETE = "complete"
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
        directory = directory_of(cache)
        directory.mkdir(parents=True, exist_ok=True)
        os.environ["NUMBA_CACHE_DIR"] = str(directory)  # numba reads it when it is imported
        ops: Ops = import_module("tuft.models.compiled").CompiledOps()
        (directory / _COMPLETE).touch()
    except (ImportError, OSError, AttributeError) as error:
        raise EngineError(f"kernels cannot be compiled or loaded: {error}") from error
    return ops


class Build:
    """Kernels on their way: ``ready`` says when ``load`` is quick, having started a process that compiles if needed.
    Raises EngineError if no process can be started or ``cache`` cannot be read."""

    def __init__(self, cache: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if not (directory_of(cache) / _COMPLETE).exists():
                command = [sys.executable, "-P", "-m", "tuft.models.kernels.build", str(cache)]
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
    os.nice(_LOW_PRIORITY)
    cache = Path(sys.argv[1])
    try:
        load(cache)
    except EngineError as error:
        sys.exit(str(error))
    for other in set(cache.iterdir()) - {directory_of(cache)}:
        shutil.rmtree(other, ignore_errors=True)  # of another version or another CPU


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: the interpreter cannot end while a thread holds its lock
    os._exit(1)


if __name__ == "__main__":
    main()
