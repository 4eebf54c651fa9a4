from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuft.errors import Damaged
from tuft.store.archive import Archive
from tuft.store.confined import confined, open_plain, plain_file
from tuft.store.weights import delete_adapter, files_to_hand_out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With one checkpoint, beside a directory that is none of its own."""
    for directory in (tmp_path / "outside", tmp_path / "root" / "tenant" / "run" / "name"):
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path / "root"


def test_what_lies_below_the_root_is_found(root: Path) -> None:
    assert confined(root, "tenant/run/name") == root / "tenant" / "run" / "name"
    assert confined(root, "tenant/run/not there yet") == root / "tenant" / "run" / "not there yet"


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert set(files_to_hand_out(tmp_path / "link", "tenant/run/name")) == {"adapter_model.safetensors"}


@pytest.mark.parametrize("place", ["tenant", "tenant/run", "tenant/run/name"])
def test_no_link_below_the_root_is_followed(root: Path, tmp_path: Path, place: str) -> None:
    moved = tmp_path / "moved"
    (root / place).rename(moved)
    (root / place).symlink_to(moved)
    with pytest.raises(Damaged, match="tenant/run/name is damaged: a link has been put in its place"):
        files_to_hand_out(root, "tenant/run/name")
    delete_adapter(root, "tenant/run/name")
    assert [path for path in moved.rglob("*.safetensors") if path.read_bytes() == b"weights"]


def test_a_file_that_is_a_link_is_not_handed_out(root: Path, tmp_path: Path) -> None:
    (root / "tenant/run/name/adapter_config.json").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(Damaged, match="adapter_config.json is damaged: it is not a plain file"):
        files_to_hand_out(root, "tenant/run/name")


def test_only_a_checkpoints_own_files_are_handed_out(root: Path) -> None:
    for name in ("optimizer.safetensors", "manifest.json", "notes.txt", "adapter_config.json.age", ".hidden"):
        (root / "tenant/run/name" / name).write_text("x")
    assert set(files_to_hand_out(root, "tenant/run/name")) == {"adapter_model.safetensors", "adapter_config.json.age"}


def test_an_archive_takes_plain_files_alone(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(root / "tenant/run/name/adapter_model.safetensors")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "outside", Path("/dev/null")):
        with pytest.raises(Damaged, match="not a plain file"):
            Archive.of({"x": path})


def test_a_file_that_becomes_a_link_is_not_opened(root: Path) -> None:
    path = root / "tenant/run/name/adapter_model.safetensors"
    plain_file(path)
    path.rename(path.with_name("real"))
    path.symlink_to("real")
    with pytest.raises(OSError, match="symbolic link"):
        open_plain(path)


def test_an_archive_sends_as_much_as_it_said(root: Path) -> None:
    path = root / "tenant/run/name/adapter_model.safetensors"
    archive = Archive.of({"weights": path})
    path.write_bytes(b"weights that have grown" * 100)
    assert len(b"".join(archive.parts())) == archive.size_bytes


SEGMENTS = st.sampled_from(["..", ".", "", "tenant", "run", "name", "~", "outside", "\0", "x" * 300, "ⅳ", "․․", "／"])


@given(st.lists(SEGMENTS, max_size=6), st.booleans())
def test_no_directory_leads_out(parts: list[str], is_absolute: bool) -> None:
    root = Path("/srv/checkpoints")  # is not there: no link can be
    try:
        path = confined(root, "/" * is_absolute + "/".join(parts))
    except (Damaged, OSError):  # a name of 300 characters
        return
    assert Path(os.path.normpath(path)).is_relative_to(root)
    assert path != root
