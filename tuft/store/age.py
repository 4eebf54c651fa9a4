"""Files that only their recipients can read, in the format of age (https://age-encryption.org/v1)."""

from __future__ import annotations

from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import pyrage

from tuft.errors import StorageError

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

SUFFIX = ".age"


def parse_recipient(text: str) -> pyrage.x25519.Recipient | pyrage.ssh.Recipient:
    """A native ``age1...`` key, or a line of an SSH public key file. Raises ValueError that says what is wrong."""
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text.strip())
    except pyrage.RecipientError as error:
        raise ValueError(str(error)) from error


def encrypt(file: Path, recipients: Sequence[str]) -> None:
    """Put an encrypted ``file.age`` in the place of ``file``. Raises StorageError, or OSError of the disk."""
    keys = [parse_recipient(text) for text in recipients]
    with file.open("rb") as plain, _Writer(f"{file}{SUFFIX}", "xb") as sealed:
        try:
            pyrage.encrypt_io(plain, sealed, keys)
        except pyrage.EncryptError as error:
            raise sealed.error or StorageError(f"{file.name} could not be encrypted: {error}") from error
        if sealed.error is not None:
            raise sealed.error
    file.unlink()


class _Writer(FileIO):
    """A file that remembers what went wrong: pyrage says nothing when its last write fails."""

    error: OSError | None = None

    def write(self, part: Buffer, /) -> int:
        left = memoryview(part).cast("B")
        num_bytes = len(left)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
            raise
        return num_bytes
