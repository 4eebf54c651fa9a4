"""What parent and engine process say to each other, and the socket it goes through.

Letters are pickled (protocol 5: numpy arrays cross as plain bytes). The socket is a private pair between our own two
processes, made by the parent and inherited by its child: nothing from outside is ever unpickled.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from dataclasses import dataclass

from tuft.engine.base import BaseModelSource, Command, EngineSettings
from tuft.errors import TuftError
from tuft.types import BaseModelInfo

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Setup:
    """Parent to child, once: what to load."""

    sources: tuple[BaseModelSource, ...]
    settings: EngineSettings


@dataclass(frozen=True, slots=True)
class Batch:
    """Parent to child: commands to be computed in one pass, each with the number that its reply will bear."""

    commands: tuple[tuple[int, Command], ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """Child to parent, once: every base model is loaded, and passes have at most so many rows."""

    base_models: tuple[BaseModelInfo, ...]
    pass_tokens: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Child to parent instead of Ready; the child then ends."""

    error: TuftError


@dataclass(frozen=True, slots=True)
class Reply:
    """Child to parent: a command's result, or the TuftError it ended with."""

    number: int
    result: object


Letter = Setup | Batch | Ready | LoadFailed | Reply


class Mailbox:
    """One end of the pair. One thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, letter: Letter) -> None:
        """Blocks until the other end has taken it. Raises OSError if that end is gone."""
        buffer = io.BytesIO()
        buffer.seek(_LENGTH.size)
        pickle.dump(letter, buffer, protocol=5)
        with buffer.getbuffer() as view:  # length and body in one call: a short letter wakes its reader once
            _LENGTH.pack_into(view, 0, len(view) - _LENGTH.size)
            self._socket.sendall(view)

    def receive(self) -> Letter:
        """The next letter. Raises EOFError if the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        letter: Letter = pickle.loads(self._read(length))  # noqa: S301 (see the head of this file)
        return letter

    def shut(self) -> None:
        """Both ends stop: theirs reads the end of the stream, ours too, in whatever thread it waits."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end was first

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise EOFError from error
            if count == 0:
                raise EOFError
            view = view[count:]
        return buffer
