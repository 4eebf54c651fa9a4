"""A child process whose system calls are held, one by one: each goes on, is refused by a number of ``errno``, or is the
last thing that the process would have done.

The kernel does it (seccomp's user notification), so that it is the real code, the real libraries and the real file
system that are interrupted. The filter is of the calling thread and those it starts, in a fork; nothing else notices.

The fork is of a process of its own, which has one thread: a fork of the tests' process may find a lock taken, of SQLite
for one, by a thread that it does not have.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_NUMBERS: Mapping[str, Mapping[str, int]] = {
    "x86_64": {
        "write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "open": 2, "openat": 257, "creat": 85, "mkdir": 83,
        "mkdirat": 258, "ftruncate": 77, "fallocate": 285, "fsync": 74, "fdatasync": 75, "rename": 82, "renameat": 264,
        "renameat2": 316, "unlink": 87, "unlinkat": 263, "rmdir": 84, "link": 86, "linkat": 265, "read": 0,
        "pread64": 17,
    },
    "aarch64": {
        "write": 64, "pwrite64": 68, "writev": 66, "pwritev": 70, "openat": 56, "mkdirat": 34, "ftruncate": 46,
        "fallocate": 47, "fsync": 82, "fdatasync": 83, "renameat": 38, "renameat2": 276, "unlinkat": 35, "linkat": 37,
        "read": 63, "pread64": 67,
    },
}  # fmt: skip
READS = frozenset({"read", "pread64"})
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_FLAGS_ARGUMENT = {"open": 1, "openat": 2}

_PR_SET_NO_NEW_PRIVS, _SET_MODE_FILTER, _NEW_LISTENER = 38, 1, 8
_LOAD_NUMBER, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NOTIFY, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_CONTINUE = 1


@dataclass(frozen=True)
class Call:
    """One system call, before it is made; ``number`` counts those that were held, from 0."""

    number: int
    name: str


RAISED = 70
"""The exit code of a child whose work raised an error."""
KILL = "kill"
Decision = int | str | None
"""An ``errno`` to answer with, ``KILL``, or None to go on."""


def unsupported() -> str | None:
    """Why this machine cannot hold calls; None if it can."""
    if platform.machine() not in _SECCOMP:
        return f"no table of system calls for {platform.machine()}"
    try:
        ended = hold(_do_nothing, lambda _call: None)
    except OSError as error:
        return f"seccomp's user notification: {error}"
    return None if ended.exit_code == 0 else f"a child with a filter ended with {ended.exit_code}"


@dataclass(frozen=True)
class Ended:
    """``exit_code`` is negative for a signal; ``calls`` are those held, in order; ``said`` is the traceback, if any."""

    exit_code: int
    calls: tuple[Call, ...]
    said: str


def hold(work: Callable[[], object], decide: Callable[[Call], Decision], *, reads: bool = False) -> Ended:
    """Do ``work``, which can be pickled, in a fork, and ask ``decide`` before each call that changes a disk, or, with
    ``reads``, reads it."""
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    with theirs, os.fdopen(write_end, "wb") as log:
        forks, _ = _forks()
        _send(forks, pickle.dumps((work, reads)), [theirs.fileno(), log.fileno()])
    child = int.from_bytes(_receive(forks)[0], "little")
    try:
        _, (listener, *_), _, _ = socket.recv_fds(ours, 1, 1)
        try:
            calls = list(_answered(listener, child, decide))
        finally:
            os.close(listener)
    except ValueError:  # no descriptor came
        calls = []
    finally:
        ours.close()
        status = int.from_bytes(_receive(forks)[0], "little")
        with os.fdopen(read_end) as opened:
            said = opened.read()
    if not calls and said.startswith("OSError: no filter"):
        raise OSError(said)
    return Ended(os.waitstatus_to_exitcode(status), tuple(calls), said)


def _do_nothing() -> None:
    pass


@cache
def _forks() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """To the process whose forks are held: it ends when the socket is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "tests.syscalls", str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], pass_fds=[theirs.fileno()])
    return ours, process


def main() -> None:
    """Fork as often as it is asked for, and tell of each fork its id and how it ended."""
    asking = socket.socket(fileno=int(sys.argv[1]))
    while True:
        try:
            message, (to_parent, log) = _receive(asking, num_descriptors=2)
        except EOFError:
            return
        work, reads = pickle.loads(message)  # what the tests' process sends
        child = os.fork()
        if child == 0:
            _be_held(work, socket.socket(fileno=to_parent), log, reads)
        os.close(to_parent)
        os.close(log)
        _send(asking, child.to_bytes(8, "little"))
        _, status = os.waitpid(child, 0)
        _send(asking, status.to_bytes(8, "little"))


def _send(to: socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    size = len(message).to_bytes(8, "little")
    if descriptors:
        socket.send_fds(to, [size], descriptors)
    else:
        to.sendall(size)
    to.sendall(message)


def _receive(of: socket.socket, num_descriptors: int = 0) -> tuple[bytes, list[int]]:
    """Raises EOFError when the other end is closed."""
    size, descriptors, _, _ = socket.recv_fds(of, 8, num_descriptors)
    left = int.from_bytes(size, "little")
    if not size:
        raise EOFError
    message = b""
    while len(message) < left:
        message += of.recv(left - len(message))
    return message, descriptors


def _be_held(work: Callable[[], object], socket_to_parent: socket.socket, log: int, reads: bool) -> None:
    """The child's whole life."""
    code = RAISED
    try:
        names = {name for name in _NUMBERS[platform.machine()] if reads or name not in READS}
        listener = _install_filter(names)
        socket.send_fds(socket_to_parent, [b"x"], [listener])
        os.close(listener)
        work()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else RAISED
    except BaseException:  # noqa: BLE001 - told to the parent
        with suppress(OSError):
            os.write(log, traceback.format_exc().encode()[-60_000:])
    finally:
        os._exit(code)


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8),
                ("operand", ctypes.c_uint32)]  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def _install_filter(names: set[str]) -> int:
    """Returns the listener's descriptor."""
    numbers = [_NUMBERS[platform.machine()][name] for name in sorted(names)]
    lines = [_Instruction(_LOAD_NUMBER, 0, 0, 0)]
    for index, number in enumerate(numbers):
        lines.append(_Instruction(_JUMP_EQUAL, len(numbers) - index, 0, number))
    lines += [_Instruction(_RETURN, 0, 0, _ALLOW), _Instruction(_RETURN, 0, 0, _NOTIFY)]
    program = _Program(len(lines), (_Instruction * len(lines))(*lines))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(f"no filter: {os.strerror(ctypes.get_errno())}")
    number = _SECCOMP[platform.machine()]
    listener = int(libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program)))
    if listener < 0:
        raise OSError(f"no filter: {os.strerror(ctypes.get_errno())}")
    return listener


def _answered(listener: int, child: int, decide: Callable[[Call], Decision]) -> Iterator[Call]:
    """The calls as they come, until the child is no more."""
    name_of = {number: name for name, number in _NUMBERS[platform.machine()].items()}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    count = 0
    while True:
        ((_, events),) = poll.poll()
        if not events & select.POLLIN:
            return
        notification = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, notification)
        except FileNotFoundError:  # it died in between
            continue
        call_id, _, _, number, _, _, *arguments = _NOTIFICATION.unpack(notification)
        name = name_of[number]
        decision: Decision = None
        if _changes_a_disk(name, arguments):
            call = Call(count, name)
            count += 1
            decision = decide(call)
            yield call
        if decision == KILL:
            os.kill(child, signal.SIGKILL)
            return
        error = decision if isinstance(decision, int) else 0
        with suppress(FileNotFoundError):
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(call_id, 0, -error, 0 if error else _CONTINUE))


def _changes_a_disk(name: str, arguments: list[int]) -> bool:
    if name in _FLAGS_ARGUMENT:
        return bool(arguments[_FLAGS_ARGUMENT[name]] & os.O_CREAT)
    return name not in ("write", "read") or arguments[0] > 2


if __name__ == "__main__":
    main()
