"""A checkpoint is listed only while it is whole; what becomes of one that is being read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.test_interrupted_saves import ALICE, KINDS, NEW, OLD, RUN, home_with_old, opened, state
from tuft.errors import Damaged, InvalidInput, NotFound, StorageError
from tuft.records import Checkpoint, CheckpointPath
from tuft.sections import StorageSection
from tuft.service.checkpoints import Checkpoints
from tuft.service.downloads import ARCHIVE, Download, Downloads
from tuft.service.inspection import Inspection
from tuft.service.signing import Signer
from tuft.service.verification import Verification
from tuft.store.archive import Archive
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.db import Database
from tuft.store.integrity import ADAPTER, MANIFEST
from tuft.store.tenants import TenantCatalog
from tuft.types import AdapterState

X = CheckpointPath(RUN.run_id, "training", "x")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return home_with_old(tmp_path, "training")


@pytest.fixture
def root(home: Path) -> Path:
    return home / "checkpoints"


@pytest.fixture
def parts(home: Path) -> Iterator[tuple[Database, Checkpoints]]:
    with opened(home) as parts:
        yield parts


@pytest.fixture
def checkpoints(parts: tuple[Database, Checkpoints]) -> Checkpoints:
    return parts[1]


@pytest.fixture
def inspection(parts: tuple[Database, Checkpoints], root: Path) -> Inspection:
    return Inspection(CheckpointCatalog(parts[0]), TenantCatalog(parts[0]), root)


@pytest.fixture
def x(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.at(X)
    assert found is not None
    return found


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def move(path: Path, to: Path) -> Path:
    return path.rename(to)


def directories(root: Path) -> list[Path]:
    return list(root.glob("*/*/*"))


async def names(checkpoints: Checkpoints) -> list[str]:
    listed, total = await checkpoints.list(ALICE.tenant_id, None, KINDS, 100, 0)
    assert total == len(listed)
    newest = (await checkpoints.newest([RUN.run_id])).values()
    assert {one.path for one in newest} <= {one.path for one in listed}
    return [checkpoint.path.name for checkpoint in listed]


async def until(checkpoints: Checkpoints, expected: list[str]) -> None:
    while True:
        if await names(checkpoints) == expected:
            return
        await asyncio.sleep(0.01)


def values(read: AdapterState) -> set[float]:
    return {float(weight[0, 0]) for weight in read.weights.values()}


async def test_one_that_lost_a_file_leaves_the_lists_at_once_and_says_why_under_its_name(
    checkpoints: Checkpoints, x: Checkpoint, root: Path
) -> None:
    await checkpoints.save(ALICE, RUN, CheckpointPath(RUN.run_id, "training", "y"), state(NEW, "training"), None, {})
    assert sorted(await names(checkpoints)) == ["x", "y"]
    (root / x.directory / ADAPTER).unlink()
    assert await names(checkpoints) == ["y"]
    with pytest.raises(
        Damaged, match=rf"^{X} is damaged: {x.directory}/{ADAPTER} cannot be read: No such file.*load"
    ) as e:
        checkpoints.get(ALICE, str(X))
    assert str(root) not in str(e.value)
    checkpoints.delete(ALICE, str(X))
    with pytest.raises(NotFound):
        checkpoints.get(ALICE, str(X))


async def test_a_flipped_bit_is_found_when_it_is_loaded_and_all_its_names_say_so(
    checkpoints: Checkpoints, x: Checkpoint, root: Path
) -> None:
    copy = CheckpointPath(RUN.run_id, "training", "copy")
    checkpoints.add_copy(ALICE, x, copy, None)
    flip(root / x.directory / ADAPTER)
    assert len(await names(checkpoints)) == 2, "nothing was read yet"
    with pytest.raises(Damaged, match=f"{ADAPTER} is damaged.*; load another checkpoint"):
        await checkpoints.read(x.directory, with_optimizer=False)
    assert await names(checkpoints) == []
    with pytest.raises(Damaged, match=str(copy)):
        checkpoints.get(ALICE, str(copy))


async def test_a_manifest_that_was_changed_and_still_fits_its_files_is_found_by_the_row(
    checkpoints: Checkpoints, x: Checkpoint, root: Path
) -> None:
    manifest = root / x.directory / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 3', '"step": 7'))
    with pytest.raises(Damaged, match=f"{MANIFEST} is damaged: its SHA-256 is not the one that the database has"):
        await checkpoints.read(x.directory, with_optimizer=True)


async def test_damage_is_found_in_the_background_and_forgotten_when_it_was_mended(
    parts: tuple[Database, Checkpoints], x: Checkpoint, root: Path
) -> None:
    database, checkpoints = parts
    file = root / x.directory / ADAPTER
    whole = file.read_bytes()
    flip(file)
    fast = StorageSection(verify_interval_days=1e-9, verify_bytes_per_s=1e12)
    serving = asyncio.create_task(Verification(CheckpointCatalog(database), root, fast).serve())
    async with asyncio.timeout(30):
        await until(checkpoints, [])
        file.write_bytes(whole)
        await until(checkpoints, ["x"])
    serving.cancel()
    assert values(await checkpoints.read(x.directory, with_optimizer=True)) == {OLD}


async def test_a_disk_that_is_not_mounted_marks_nothing(checkpoints: Checkpoints, x: Checkpoint, root: Path) -> None:
    away = move(root, root.with_name("away"))
    for call in (names(checkpoints), checkpoints.read(x.directory, with_optimizer=True)):
        with pytest.raises(StorageError, match="the directory of all checkpoints") as caught:
            await call
        assert not isinstance(caught.value, Damaged)
    move(away, root)
    assert await names(checkpoints) == ["x"]
    await checkpoints.read(x.directory, with_optimizer=True)


async def test_what_is_replaced_while_it_is_read_is_read_to_its_end(
    checkpoints: Checkpoints, x: Checkpoint, root: Path
) -> None:
    with checkpoints.holding(x.directory):
        await checkpoints.save(ALICE, RUN, X, state(NEW, "training"), None, {})
        assert values(await checkpoints.read(x.directory, with_optimizer=True)) == {OLD}
        with checkpoints.holding(x.directory):
            pass
        assert (root / x.directory).exists(), "the first reader is not done"
    assert not (root / x.directory).exists()
    present = checkpoints.get(ALICE, str(X))
    assert values(await checkpoints.read(present.directory, with_optimizer=True)) == {NEW}


async def test_readers_and_writers_of_one_name_at_once_get_one_save_or_another(
    checkpoints: Checkpoints, root: Path
) -> None:
    async def write(value: float) -> None:
        await checkpoints.save(ALICE, RUN, X, state(value, "training"), None, {})

    async def read() -> set[float]:
        found = values(await checkpoints.read(checkpoints.get(ALICE, str(X)).directory, with_optimizer=True))
        await names(checkpoints)
        return found

    for first in range(10, 40, 10):
        writes = [write(float(first + number)) for number in range(5)]
        found = await asyncio.gather(*(read() for _ in range(5)), *writes, *(read() for _ in range(5)))
        assert all(len(got) == 1 for got in found if got is not None)
    assert len(directories(root)) == 1, "and the last one stays alone"
    assert await names(checkpoints) == ["x"]


def content(download: Download) -> bytes:
    with download.held:
        if isinstance(download.content, Archive):
            return b"".join(download.content.parts())
        return download.content.read_bytes()


async def test_a_download_that_has_begun_ends_though_its_checkpoint_is_deleted(
    checkpoints: Checkpoints, x: Checkpoint, root: Path
) -> None:
    downloads = Downloads(checkpoints, Signer(b"secret"))
    expected = content(await downloads.follow(await downloads.archive(ALICE, str(X))))
    link = await downloads.archive(ALICE, str(X))
    assert link.file == ARCHIVE
    download = await downloads.follow(link)
    checkpoints.delete(ALICE, str(X))
    assert content(download) == expected
    assert not (root / x.directory).exists()
    with pytest.raises(NotFound):
        await downloads.follow(link)


async def test_nobody_gets_a_link_to_what_is_damaged(checkpoints: Checkpoints, x: Checkpoint, root: Path) -> None:
    flip(root / x.directory / ADAPTER)
    with pytest.raises(Damaged, match=ADAPTER):
        await Downloads(checkpoints, Signer(b"secret")).archive(ALICE, str(X))
    assert await names(checkpoints) == []


def test_the_operator_sees_the_damaged_and_those_without_a_name(
    inspection: Inspection, x: Checkpoint, root: Path
) -> None:
    assert inspection.checkpoints() == inspection.checkpoints("alice") == inspection.checkpoints(None, [str(X)]) == [x]
    for wrong, kind in (("tinker://s1:train:0/weights/y", NotFound), ("x", InvalidInput)):
        with pytest.raises(kind, match=r"^path: "):
            inspection.checkpoints(None, [wrong])
    with pytest.raises(NotFound, match="no tenant 'bob'"):
        inspection.checkpoints("bob")
    read: list[int] = []
    found = inspection.verify(x, read.append)
    assert found is not None
    assert found.damage is None
    manifest_bytes = (root / x.directory / MANIFEST).stat().st_size
    assert sum(read) == x.size_bytes - manifest_bytes
    flip(root / x.directory / ADAPTER)
    found = inspection.verify(x, read.append)
    assert found is not None
    assert found.damage is not None
    assert [item.damage for item in inspection.checkpoints()] == [found.damage]


def test_what_was_deleted_while_it_was_verified_is_no_damage(
    inspection: Inspection, checkpoints: Checkpoints, x: Checkpoint
) -> None:
    checkpoints.delete(ALICE, str(X))
    assert inspection.verify(x, lambda _: None) is None


def test_a_database_that_names_nothing_deletes_nothing(inspection: Inspection, x: Checkpoint, root: Path) -> None:
    (root / x.directory).rename(root / "t-lost")
    (root / "t-lost").rename(root / f"{x.directory}-lost")
    old = root / f"{x.directory}-lost"
    os.utime(old, (0, 0))  # no save is at work there
    (orphan,) = inspection.orphans()
    inspection.delete_orphans([orphan])
    assert not old.exists()
    inspection._catalog.delete(X)
    with pytest.raises(InvalidInput, match="another home's"):
        inspection.delete_orphans([orphan])
