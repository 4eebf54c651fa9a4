"""Whatever happens to a file of a saved adapter is found, and named."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyrage
import pytest

from tests.syscalls import Call, hold, unsupported
from tuft.errors import Damaged, StorageError
from tuft.store.integrity import ADAPTER, CONFIG, MANIFEST, OPTIMIZER, Stored, check_present, read_through
from tuft.store.weights import Written, read_adapter, write_adapter, write_external
from tuft.types import AdapterState, LoraSpec

FILES = (ADAPTER, CONFIG, OPTIMIZER, MANIFEST)
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
RECIPIENT = str(pyrage.x25519.Identity.generate().to_public())


def state() -> AdapterState:
    rng = np.random.default_rng(0)
    weights = {NAME.format(part): rng.normal(size=(4, 6)).astype(np.float32) for part in "AB"}
    return AdapterState(LoraSpec(rank=4), weights, weights, weights, weights, step=3)


def weights_alone() -> AdapterState:
    return AdapterState(LoraSpec(rank=4), state().weights)


def stored(written: Written) -> Stored:
    return Stored("t/r/a", written.digest, written.size_bytes)


def verify(root: Path, found: Stored) -> int:
    return sum(read_through(root, found))


def test_what_was_written_is_whole_and_read_to_the_last_byte(tmp_path: Path) -> None:
    whole = stored(write_adapter(tmp_path, "t/r/a", state(), "base"))
    read = sum((tmp_path / "t/r/a" / name).stat().st_size for name in FILES if name != MANIFEST)
    assert verify(tmp_path, whole) == read
    assert check_present(tmp_path, whole)["files"].keys() == set(FILES) - {MANIFEST}


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_flips_anywhere_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    written = write_adapter(tmp_path, "t/r/a", state(), "base")
    file = tmp_path / "t/r/a" / name
    content = file.read_bytes()
    rng = random.Random(name)
    for bit in [0, 8 * len(content) - 1, *(rng.randrange(8 * len(content)) for _ in range(200))]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(Damaged, match=f"^t/r/a/{name} is damaged"):
            verify(tmp_path, stored(written))
        with pytest.raises(Damaged, match=f"^t/r/a/{name} is damaged"):
            read_adapter(tmp_path, "t/r/a", with_optimizer=True, digest=written.digest)
    file.write_bytes(content)
    verify(tmp_path, stored(written))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_other_length_is_found_without_reading_it(tmp_path: Path, name: str) -> None:
    whole = stored(write_adapter(tmp_path, "t/r/a", state(), "base"))
    file = tmp_path / "t/r/a" / name
    content = file.read_bytes()
    for length in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(Damaged, match=name):
            check_present(tmp_path, whole)
    file.write_bytes(content + b"\0")
    with pytest.raises(Damaged, match=name):
        check_present(tmp_path, whole)


def removed(file: Path) -> None:
    file.unlink()


def directory_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_instead(file: Path) -> None:
    elsewhere = file.rename(file.parent.parent / f"elsewhere-{file.name}")
    file.symlink_to(elsewhere)


def pipe_instead(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [removed, directory_instead, link_instead, pipe_instead])
def test_what_is_no_file_any_more_is_found_without_reading_it(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    whole = stored(write_adapter(tmp_path, "t/r/a", state(), "base"))
    harm(tmp_path / "t/r/a" / name)
    with pytest.raises(Damaged, match=f"^t/r/a/{name} "):
        check_present(tmp_path, whole)
    with pytest.raises(Damaged, match=name):
        read_adapter(tmp_path, "t/r/a", with_optimizer=True, digest=whole.digest)


def test_a_directory_that_is_gone_is_damage_but_a_disk_that_is_gone_is_not(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    whole = stored(write_adapter(root, "t/r/a", state(), "base"))
    shutil.rmtree(root / "t")
    with pytest.raises(Damaged, match="manifest.json cannot be read: No such file"):
        check_present(root, whole)
    root.rmdir()
    with pytest.raises(StorageError, match="the directory of all checkpoints, 'checkpoints'.*is not there") as caught:
        check_present(root, whole)
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"files": []}', b'{"files": {"a": 1}}', b'{"files": {"a": {"size": "x"}}}', b"\xff",
     b'{"files": {"../../x": {"size": 1, "sha256": ""}}}', b'{"files": {}}', b'{"files": {}, "lora": {"size": 3}}'],
)  # fmt: skip
def test_a_manifest_that_is_none_is_found_also_where_no_digest_is_known(tmp_path: Path, content: bytes) -> None:
    write_adapter(tmp_path, "t/r/a", state(), "base")
    (tmp_path / "t/r/a" / MANIFEST).write_bytes(content)
    with pytest.raises(Damaged):
        read_adapter(tmp_path, "t/r/a", with_optimizer=True)


def test_those_of_older_servers_verify_by_what_they_have(tmp_path: Path) -> None:
    """Rows without a digest; external ones without a manifest."""
    written = write_adapter(tmp_path, "t/r/a", state(), "base")
    old = Stored("t/r/a", None, written.size_bytes)
    verify(tmp_path, old)
    (tmp_path / "t/r/a" / ADAPTER).write_bytes(b"damaged")
    with pytest.raises(Damaged, match=ADAPTER):
        verify(tmp_path, old)

    for name, recipients in (("plain", None), ("sealed", [RECIPIENT])):
        path = tmp_path / "t/r" / name
        size_bytes, digest = write_external(tmp_path, f"t/r/{name}", weights_alone(), "base", recipients)
        verify(tmp_path, Stored(f"t/r/{name}", digest, size_bytes))
        (path / MANIFEST).unlink()
        with pytest.raises(Damaged, match=MANIFEST):
            verify(tmp_path, Stored(f"t/r/{name}", digest, size_bytes))
        old = Stored(f"t/r/{name}", None, size_bytes)
        verify(tmp_path, old)
        for file in path.iterdir():
            content = file.read_bytes()
            file.write_bytes(content + b"x")
            with pytest.raises(Damaged, match=name):
                check_present(tmp_path, old)
            file.unlink()
            with pytest.raises(Damaged, match=name):
                check_present(tmp_path, old)
            file.write_bytes(content)
        verify(tmp_path, old)
    config = tmp_path / "t/r/plain" / CONFIG
    config.write_bytes(b"x" * config.stat().st_size)
    with pytest.raises(Damaged, match="plain is damaged"):
        check_present(tmp_path, Stored("t/r/plain", None, sum(f.stat().st_size for f in config.parent.iterdir())))


def be_refused(root: Path, whole: Stored, refusal: int) -> None:
    with pytest.raises(StorageError, match=os.strerror(refusal)) as caught:
        verify(root, whole)
    raise SystemExit(4 if isinstance(caught.value, Damaged) else 3)


@pytest.mark.skipif(unsupported() is not None, reason=f"system calls cannot be held: {unsupported()}")
@pytest.mark.parametrize("refusal", [errno.EIO, errno.EMFILE])
def test_a_disk_that_does_not_read_is_damage_but_a_process_that_cannot_is_not(tmp_path: Path, refusal: int) -> None:
    whole = stored(write_adapter(tmp_path, "t/r/a", state(), "base"))
    calls = hold(partial(verify, tmp_path, whole), lambda _call: None, reads=True).calls
    assert len(calls) >= 4
    for number in range(len(calls)):

        def refuse(call: Call, at: int) -> int | None:
            return refusal if call.number == at else None

        ended = hold(partial(be_refused, tmp_path, whole, refusal), partial(refuse, at=number), reads=True)
        assert ended.exit_code == (4 if refusal == errno.EIO else 3), ended.said


def test_a_manifest_says_what_it_says_in_words_that_people_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, "t/r/a", state(), "base")
    manifest = json.loads((tmp_path / "t/r/a" / MANIFEST).read_text())
    assert manifest["base_model"] == "base"
    assert manifest["files"][ADAPTER]["size"] == (tmp_path / "t/r/a" / ADAPTER).stat().st_size
