"""A save that is interrupted before each of its changes to the disk, or is refused one of them.

The real save, database included, runs in a fork whose system calls are held (``tests.syscalls``).
"""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tests.syscalls import KILL, Call, hold, unsupported
from tuft.errors import StorageError
from tuft.records import Checkpoint, CheckpointPath, Run, Session, Tenant, now
from tuft.sections import StorageSection
from tuft.service.audit import Audit
from tuft.service.checkpoints import Checkpoints
from tuft.service.projects import Projects
from tuft.service.tenants import Tenants
from tuft.store.audit import AuditLog
from tuft.store.catalog import Catalog
from tuft.store.checkpoints import CheckpointCatalog
from tuft.store.db import Database, open_database, sqlite_url
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog
from tuft.store.weights import find_orphans, read_adapter
from tuft.types import AdapterState, CheckpointKind, LoraSpec

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=f"system calls cannot be held: {unsupported()}")

ALICE = Tenant("tenant-a", "alice")
MOMENT = now()
RUN = Run("s1:train:0", ALICE.tenant_id, "s1", 0, "m", LoraSpec(rank=4), "live", MOMENT, MOMENT, {})
KINDS: tuple[CheckpointKind, ...] = ("training", "sampler", "external")
OLD, NEW = 1.0, 2.0


def state(value: float, kind: CheckpointKind) -> AdapterState:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format(part): np.full((40, 60), value, np.float32) for part in "AB"}
    moments = weights if kind == "training" else {}
    return AdapterState(RUN.spec, weights, moments, moments, moments, step=3 if moments else 0)


@contextmanager
def opened(home: Path) -> Iterator[tuple[Database, Checkpoints]]:
    database = open_database(sqlite_url(home))
    try:
        audit = Audit(AuditLog(database), 90.0)
        tenants = Tenants(TenantCatalog(database), audit, b"secret")
        catalog, storage = CheckpointCatalog(database), StorageSection(min_free_bytes=0)
        yield database, Checkpoints(catalog, home / "checkpoints", storage, tenants, Projects(()), audit)
    finally:
        database.close()


def save(home: Path, value: float, kind: CheckpointKind, times: int = 1) -> int:
    """Up to ``times``, until one succeeds; returns how many did not. Raises StorageError if none did."""
    path = CheckpointPath(RUN.run_id, kind, "x")
    with opened(home) as (_, checkpoints):
        for num_failed in range(times):
            try:
                asyncio.run(checkpoints.save(ALICE, RUN, path, state(value, kind), None, {}))
            except StorageError as error:
                said = str(error)
            else:
                return num_failed
            assert str(home) not in said, "a client is told nothing of the server's directories"
    raise StorageError(said)


def exit_after_save(home: Path, kind: CheckpointKind, times: int = 1) -> None:
    """NEW; the exit code tells how many failed before."""
    raise SystemExit(save(home, NEW, kind, times))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where the machine has one: what is synced there costs no time."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def home_with_old(memory: Path, kind: CheckpointKind) -> Path:
    """A home in which the name stands for OLD."""
    home = memory / "before"
    (home / "checkpoints").mkdir(parents=True)
    with opened(home) as (database, _):
        TenantCatalog(database).ensure_tenant(ALICE)
        SessionCatalog(database).add(Session("s1", ALICE.tenant_id, MOMENT, (), {}, "0.38.0", None))
        Catalog(database).add_run(RUN)
    save(home, OLD, kind)
    return home


def after_a_restart(home: Path) -> list[float]:
    """What the listed checkpoints hold, after the sweep of a new server; all of them verify."""
    with opened(home) as (database, checkpoints):
        asyncio.run(checkpoints.sweep())
        root = home / "checkpoints"
        assert list(root.glob("**/.*")) == [], "nothing half-written is left"
        catalog = CheckpointCatalog(database)
        listed, _ = asyncio.run(checkpoints.list(ALICE.tenant_id, None, KINDS, 100, 0))
        for checkpoint in listed:
            asyncio.run(checkpoints.verification.verify(checkpoint))
        directories = {str(path.relative_to(root)) for path in root.glob("*/*/*")}
        assert len(directories - catalog.named_directories()) <= 1, "at most what was written and got no row"
        assert find_orphans(root, catalog.named_directories) == [], "which is told of after an hour"
        return [held(root, checkpoint) for checkpoint in listed]


def held(root: Path, checkpoint: Checkpoint) -> float:
    if checkpoint.path.kind == "external":
        return float((root / checkpoint.directory / "adapter_model.safetensors").read_bytes()[-1] == 64) + 1.0
    read = read_adapter(root, checkpoint.directory, with_optimizer=True, digest=checkpoint.digest)
    (value,) = {float(value) for weight in read.weights.values() for value in np.unique(weight)}
    assert read.step == (3 if checkpoint.path.kind == "training" else 0)
    return value


def copied(before: Path, name: str) -> Path:
    return Path(shutil.copytree(before, before.with_name(name)))


def changes(before: Path, kind: CheckpointKind) -> list[Call]:
    """Those that an uninterrupted save makes."""
    home = copied(before, "uninterrupted")
    ended = hold(partial(exit_after_save, home, kind), lambda _call: None)
    assert ended.exit_code == 0, ended.said
    assert after_a_restart(home) == [NEW]
    names = {call.name for call in ended.calls}
    assert {"fsync"} <= names
    assert names & {"rename", "renameat", "renameat2"}
    return list(ended.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_killed_before_any_of_its_changes_leaves_the_old_or_the_new(memory: Path, kind: CheckpointKind) -> None:
    before = home_with_old(memory, kind)
    found = []
    for number in range(len(changes(before, kind))):
        home = copied(before, f"killed-{number}")

        def kill(call: Call, at: int = number) -> str | None:
            return KILL if call.number == at else None

        ended = hold(partial(exit_after_save, home, kind), kill)
        assert ended.exit_code == -9, ended.said
        (value,) = after_a_restart(home)
        found.append(value)
        shutil.rmtree(home)
    assert found == sorted(found), "the name changes its meaning at one moment"
    assert set(found) == {OLD, NEW}


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [("training", errno.ENOSPC), ("training", errno.EIO), ("external", errno.ENOSPC), ("sampler", errno.EIO)],
)
def test_a_save_refused_any_of_its_changes_fails_whole_and_the_next_one_succeeds(
    memory: Path, kind: CheckpointKind, refusal: int
) -> None:
    before = home_with_old(memory, kind)
    calls = changes(before, kind)
    begun = [call.name for call in calls].index("mkdir")  # before that the database is opened, as at a server's start
    outcomes = set()
    for number in range(begun, len(calls)):
        home = copied(before, f"refused-{number}")

        def refuse(call: Call, at: int = number) -> int | None:
            return refusal if call.number == at else None

        ended = hold(partial(exit_after_save, home, kind, times=2), refuse)
        refused = ended.calls[number].name
        assert ended.exit_code in (0, 1), f"{refused}: {ended.said}"
        if refused not in ("unlink", "unlinkat", "rmdir"):
            assert list((home / "checkpoints").glob("**/.*")) == [], f"{refused}: what was half-written is gone"
        assert after_a_restart(home) == [NEW]
        outcomes.add((refused, ended.exit_code))
        shutil.rmtree(home)
    for fatal in {"mkdir", "write", "fsync", "pwrite64"} & {call.name for call in calls[begun:]}:
        assert (fatal, 1) in outcomes, "its save failed, and the next one of the same server did not"
