from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

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


def test_several_that_make_it_at_once_all_get_the_same(tmp_path: Path) -> None:
    for number in range(50):
        home = tmp_path / str(number)
        home.mkdir()
        together = Barrier(8)

        def load(home: Path = home, together: Barrier = together) -> bytes:
            together.wait()
            return load_secret(home)

        with ThreadPoolExecutor(8) as pool:
            secrets = {future.result() for future in [pool.submit(load) for _ in range(8)]}
        assert secrets == {(home / "signing_key").read_bytes()}
        assert [path.name for path in home.iterdir()] == ["signing_key"]


def test_one_that_is_cut_off_or_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "signing_key").write_bytes(b"short")
    with pytest.raises(StorageError, match="signing_key is damaged; delete it"):
        load_secret(tmp_path)
    with pytest.raises(StorageError, match="signing_key cannot be used: No such file"):
        load_secret(tmp_path / "nowhere")
