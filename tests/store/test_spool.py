from __future__ import annotations

from pathlib import Path

import pytest

from tuft.errors import StorageError
from tuft.store.spool import Spool

ID = "future-00ff"


def test_what_was_written_is_read_by_another_spool(tmp_path: Path) -> None:
    Spool(tmp_path).write(ID, "request", b"data")
    assert Spool(tmp_path).read(ID, "request") == b"data"
    assert Spool(tmp_path).names() == {(ID, "request")}


def test_request_and_result_are_two_files(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ID, "request", b"asked")
    spool.write(ID, "result", b"answered")
    spool.delete(ID, "request")
    spool.delete(ID, "request")
    assert spool.read(ID, "result") == b"answered"
    with pytest.raises(StorageError, match="the request of future-00ff cannot be read"):
        spool.read(ID, "request")


def test_a_disk_that_refuses_leaves_nothing_and_is_an_error_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "ff").write_text("a file where the directory belongs")
    with pytest.raises(StorageError, match="4 bytes of a request could not be journaled") as raised:
        Spool(tmp_path).write(ID, "request", b"data")
    assert str(tmp_path) not in str(raised.value)
    assert Spool(tmp_path).names() == set()
