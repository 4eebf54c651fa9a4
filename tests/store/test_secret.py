from __future__ import annotations

from pathlib import Path

import pytest

from tuft.errors import StorageError
from tuft.store.secret import load_secret


def test_it_is_made_once_for_its_owners_eyes(tmp_path: Path) -> None:
    file = tmp_path / "signing_key"
    secret = load_secret(tmp_path)
    assert (len(secret), load_secret(tmp_path)) == (32, secret)
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "other").mkdir()
    assert load_secret(tmp_path / "other") != secret


def test_one_that_is_cut_off_or_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "signing_key").write_bytes(b"short")
    with pytest.raises(StorageError, match="signing_key is damaged; delete it"):
        load_secret(tmp_path)
    with pytest.raises(StorageError, match="signing_key cannot be used: No such file"):
        load_secret(tmp_path / "nowhere")
