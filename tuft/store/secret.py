"""The server's own secret, which signs what it hands out."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_bytes, token_hex

from tuft.errors import StorageError

_NUM_BYTES = 32


def load_secret(home: Path) -> bytes:
    """That of ``home``, made the first time and readable by its owner alone. Of several processes that make one at the
    same time all get the same. Raises StorageError."""
    file = home / "signing_key"
    partial = home / f".{file.name}-{token_hex(4)}"
    try:
        if not file.exists():
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as opened:
                    opened.write(token_bytes(_NUM_BYTES))
                    opened.flush()
                    os.fsync(descriptor)
                with suppress(FileExistsError):  # another process was first: its secret is the one
                    file.hardlink_to(partial)
            finally:
                partial.unlink()
        secret = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file} cannot be used: {error.strerror}") from error
    if len(secret) < _NUM_BYTES:
        raise StorageError(f"{file} is damaged; delete it: links that were given out end then")
    return secret
