"""Files that only their recipients can read, in the format of age (https://age-encryption.org/v1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyrage

from tuft.errors import StorageError

SUFFIX = ".age"


def parse_recipient(text: str) -> pyrage.x25519.Recipient | pyrage.ssh.Recipient:
    """A native ``age1...`` key, or a line of an SSH public key file. Raises ValueError that says what is wrong."""
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text.strip())
    except pyrage.RecipientError as error:
        raise ValueError(str(error)) from error


def encrypt(file: Path, recipients: Sequence[str]) -> None:
    """Put an encrypted ``file.age`` in the place of ``file``. Raises StorageError."""
    try:
        pyrage.encrypt_file(str(file), f"{file}{SUFFIX}", [parse_recipient(text) for text in recipients])
    except pyrage.EncryptError as error:
        raise StorageError(f"{file.name} could not be encrypted: {error}") from error
    file.unlink()
