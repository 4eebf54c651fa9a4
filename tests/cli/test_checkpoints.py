"""`tuft checkpoint`, on a home with two saved checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.conftest import Tuft
from tests.service.test_interrupted_saves import NEW, home_with_old, save
from tuft.cli import app
from tuft.errors import InvalidInput, NotFound

PATHS = [f"tinker://s1:train:0/{kind}/x" for kind in ("sampler_weights", "weights")]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = home_with_old(tmp_path, "training")
    save(home, NEW, "sampler")
    return home


@pytest.fixture
def adapter(home: Path) -> Path:
    """A file of the training checkpoint."""
    (optimizer,) = home.glob("checkpoints/*/*/*/optimizer.safetensors")
    return optimizer.with_name("adapter_model.safetensors")


def lost(home: Path, hours: float = 2) -> Path:
    """A directory whose save died before its row was written, so long ago."""
    (whole,) = {file.parent for file in home.glob("checkpoints/*/*/*/optimizer.safetensors")}
    made = Path(shutil.copytree(whole, whole.with_name("lost-1")))
    os.utime(made, (time.time() - hours * 3600,) * 2)
    return made


def flip(file: Path) -> bytes:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return content


def test_all_is_whole_and_says_so(tuft: Tuft, home: Path) -> None:
    assert "2 of 2 checkpoints are whole" in tuft("checkpoint", "verify", home=home)
    listed = json.loads(tuft("checkpoint", "list", "--json", home=home))
    assert [item["path"] for item in listed] == PATHS
    assert {item["damage"] for item in listed} == {None}
    assert {item["tenant_id"] for item in listed} == {"tenant-a"}
    shown = tuft("checkpoint", "list", home=home)
    assert all(path in shown for path in PATHS)


def test_what_is_damaged_is_told_and_the_exit_code_says_it_too(tuft: Tuft, home: Path, adapter: Path) -> None:
    whole = flip(adapter)
    for words in ([], [PATHS[1]], ["--tenant", "alice"]):
        done = CliRunner().invoke(app, ["checkpoint", "verify", "--home", str(home), *words])
        assert done.exit_code == 1
        assert PATHS[1] in done.stdout
        assert "adapter_model.safetensors is damaged" in done.stdout
    done = CliRunner().invoke(app, ["checkpoint", "verify", "--home", str(home), "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["num_verified"], [item["path"] for item in told["damaged"]]) == (2, [PATHS[1]])
    assert [item["path"] for item in json.loads(tuft("checkpoint", "list", "--damaged", "--json", home=home))] == [
        PATHS[1]
    ]
    assert "1 of 1 checkpoints are whole" in tuft("checkpoint", "verify", PATHS[0], home=home)
    adapter.write_bytes(whole)
    assert "2 of 2 checkpoints are whole" in tuft("checkpoint", "verify", home=home)
    assert json.loads(tuft("checkpoint", "list", "--damaged", "--json", home=home)) == []


def test_directories_without_a_name_are_told_and_deleted_on_demand(tuft: Tuft, home: Path) -> None:
    old = lost(home)
    told = tuft("checkpoint", "verify", home=home)
    assert "tenant-a/s1:train:0/lost-1" in told
    assert "directories without a name: 1, " in told
    assert "--delete-orphans deletes them" in told
    assert old.exists()
    (orphan,) = json.loads(tuft("checkpoint", "verify", "--json", home=home))["orphans"]
    assert orphan["directory"] == "tenant-a/s1:train:0/lost-1"
    assert "2 of 2 checkpoints are whole" in tuft("checkpoint", "verify", "--delete-orphans", home=home)
    assert not old.exists()
    assert json.loads(tuft("checkpoint", "verify", "--json", home=home))["orphans"] == []


def test_a_save_that_is_under_way_is_no_orphan(tuft: Tuft, home: Path) -> None:
    young = lost(home, hours=0.5)
    tuft("checkpoint", "verify", "--delete-orphans", home=home)
    assert young.exists()


def test_a_database_of_another_home_deletes_nothing(tuft: Tuft, home: Path) -> None:
    lost(home)
    for file in home.glob("tuft.sqlite3*"):
        file.unlink()
    with pytest.raises(InvalidInput, match="may be another home's"):
        tuft("checkpoint", "verify", "--delete-orphans", home=home)
    assert len(list(home.glob("checkpoints/*/*/*/manifest.json"))) == 3


def test_what_does_not_exist_is_named(tuft: Tuft, home: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint tinker://s1:train:0/weights/y; `tuft checkpoint list`"):
        tuft("checkpoint", "verify", "tinker://s1:train:0/weights/y", home=home)
    with pytest.raises(NotFound, match="no tenant 'bob'"):
        tuft("checkpoint", "list", "--tenant", "bob", home=home)
    with pytest.raises(InvalidInput, match="^path: got 'x'"):
        tuft("checkpoint", "verify", "x", home=home)
