from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tuft.errors import StorageError
from tuft.store.archive import Archive


@pytest.mark.parametrize("size", [1, 511, 512, 513, 3 * 2**20])
def test_the_tar_holds_the_files_and_is_as_long_as_it_says(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "weights").write_bytes(content)
    archive = Archive.of({"weights": tmp_path / "weights", "complete": None})
    made = b"".join(archive.parts())
    assert len(made) == archive.size_bytes
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        assert tar.getnames() == ["weights", "complete"]
        read = [tar.extractfile(name) for name in tar.getnames()]
        assert [file.read() for file in read if file is not None] == [content, b""]


def test_a_file_deleted_while_it_is_sent_is_sent_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    archive = Archive.of({name: tmp_path / name for name in ("a", "b")})
    parts = archive.parts()
    first = next(parts)
    (tmp_path / "b").unlink()
    assert len(first + b"".join(parts)) == archive.size_bytes


def test_a_file_that_is_missing_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere cannot be read: No such file"):
        Archive.of({"x": tmp_path / "nowhere"})
