from __future__ import annotations

import errno
import json
import os
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyrage
import pytest

from tests.syscalls import Call, hold, unsupported
from tuft.errors import Damaged, StorageError
from tuft.store.weights import (
    delete_adapter,
    files_to_hand_out,
    find_orphans,
    read_adapter,
    sweep,
    write_adapter,
    write_external,
)
from tuft.types import AdapterState, LoraSpec

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def state(optimizer: bool = True) -> AdapterState:
    rng = np.random.default_rng(0)
    weights = {NAME.format(part): rng.normal(size=(4, 6)).astype(np.float32) for part in "AB"}
    moments = {name: array * 2 for name, array in weights.items()} if optimizer else {}
    return AdapterState(LoraSpec(rank=4, seed=7), weights, moments, moments, moments, step=3 if optimizer else 0)


def assert_equal(left: AdapterState, right: AdapterState) -> None:
    assert (left.spec, left.step, left.optimizer) == (right.spec, right.step, right.optimizer)
    for part in ("weights", "exp_avg", "exp_avg_sq", "gradients"):
        ours, theirs = getattr(left, part), getattr(right, part)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("optimizer", [True, False])
def test_what_was_written_is_read_back_equal(tmp_path: Path, optimizer: bool) -> None:
    size_bytes, digest = write_adapter(tmp_path, "a/b", state(optimizer), "base")
    assert size_bytes == sum(path.stat().st_size for path in (tmp_path / "a/b").iterdir())
    assert_equal(read_adapter(tmp_path, "a/b", with_optimizer=True, digest=digest), state(optimizer))


def test_a_dimuon_keeps_its_name_and_its_only_moment(tmp_path: Path) -> None:
    written = replace(state(), optimizer="dimuon", exp_avg_sq={})
    write_adapter(tmp_path, "a", written, "base")
    assert_equal(read_adapter(tmp_path, "a", with_optimizer=True), written)
    manifest = tmp_path / "a/manifest.json"
    older = {key: value for key, value in json.loads(manifest.read_text()).items() if key != "optimizer"}
    manifest.write_text(json.dumps(older))
    assert read_adapter(tmp_path, "a", with_optimizer=False).optimizer == "adamw"


def test_the_weights_alone_come_without_moments_and_step(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    assert_equal(read_adapter(tmp_path, "a", with_optimizer=False), state(optimizer=False))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    (tmp_path / "a/optimizer.safetensors").unlink()
    with pytest.raises(Damaged, match="a/optimizer.safetensors cannot be read: No such file"):
        read_adapter(tmp_path, "a", with_optimizer=True)
    read_adapter(tmp_path, "a", with_optimizer=False)


def test_nothing_appears_under_the_name_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file where a directory has to be")
    with pytest.raises(StorageError, match="could not be written"):
        write_adapter(tmp_path, "a/b", state(), "base")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_handed_out_is_pefts_files_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    assert files_to_hand_out(tmp_path, "a").keys() == {"adapter_config.json", "adapter_model.safetensors"}
    size_bytes, _ = write_external(tmp_path, "b", state(optimizer=False), "base", None)
    files = files_to_hand_out(tmp_path, "b")
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"}
    assert sum(path.stat().st_size for path in files.values()) == size_bytes
    with pytest.raises(StorageError, match="nowhere cannot be read"):
        files_to_hand_out(tmp_path, "nowhere")


def test_nothing_appears_under_the_name_when_encrypting_fails(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not be encrypted: Missing recipients"):
        write_external(tmp_path, "a", state(optimizer=False), "base", [])
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_deletes_what_is_half_written_and_nothing_else(tmp_path: Path) -> None:
    write_adapter(tmp_path, "t/r/whole-1", state(), "base")
    (tmp_path / "t/r/.partial-x").mkdir()
    (tmp_path / "t/r/.partial-x/adapter_model.safetensors").write_bytes(b"half")
    assert sweep(tmp_path) == 1
    assert [path.name for path in (tmp_path / "t/r").iterdir()] == ["whole-1"]


def test_what_would_leave_too_little_of_the_disk_free_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refused:
        write_adapter(tmp_path, "t/r/a", state(), "base", min_free_bytes=2**60)
    said = str(refused.value)
    assert re.search(
        r"t/r/a could not be written: the disk is full \(the last 1,152,\d{3},[\d,]+ bytes are kept free\)", said
    )
    assert re.search(r"it needs about [\d,]+ bytes, and [\d,]+ are free in the server's '.*' directory; delete", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", [True, False])
def test_as_many_bytes_are_predicted_as_are_needed_and_little_more(tmp_path: Path, optimizer: bool) -> None:
    names = [f"base_model.model.model.layers.{index}.self_attn.q_proj.lora_A.weight" for index in range(40)]
    weights = {name: np.zeros((64, 64), np.float32) for name in names}
    large = AdapterState(LoraSpec(rank=4), weights, *([weights] * 3 if optimizer else []))
    with pytest.raises(StorageError) as refused:
        write_adapter(tmp_path, "a", large, "base", min_free_bytes=2**60)
    predicted = int(re.findall(r"needs about ([\d,]+) bytes", str(refused.value))[0].replace(",", ""))
    size_bytes, _ = write_adapter(tmp_path, "a", large, "base")
    assert size_bytes <= predicted <= 1.2 * size_bytes


def test_a_directory_that_is_there_already_stays_as_it_is(tmp_path: Path) -> None:
    written = write_adapter(tmp_path, "a", state(), "base")
    with pytest.raises(StorageError, match="could not be written: Directory not empty"):
        write_adapter(tmp_path, "a", state(optimizer=False), "base")
    assert_equal(read_adapter(tmp_path, "a", with_optimizer=True, digest=written.digest), state())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_without_a_name_is_told_of_after_an_hour_unless_it_gets_one_meanwhile(tmp_path: Path) -> None:
    for directory in ("t/r/named-1", "t/r/lost-2", "t/r/young-3"):
        write_adapter(tmp_path, directory, state(), "base")
    two_hours_ago = time.time() - 7200
    for name in ("named-1", "lost-2"):
        os.utime(tmp_path / "t/r" / name, (two_hours_ago, two_hours_ago))
    (orphan,) = find_orphans(tmp_path, lambda: {"t/r/named-1"})
    assert orphan.directory == "t/r/lost-2"
    assert orphan.size_bytes == sum(path.stat().st_size for path in (tmp_path / "t/r/lost-2").iterdir())
    delete_adapter(tmp_path, orphan.directory)
    assert sorted(path.name for path in (tmp_path / "t/r").iterdir()) == ["named-1", "young-3"]


def test_the_configuration_is_pefts(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32.0)
    assert config["target_modules"] == ["q_proj"]


def write_sealed(root: Path, recipients: list[str]) -> None:
    write_external(root, "t/r/a", state(optimizer=False), "base", recipients)


def be_refused(root: Path, recipients: list[str], refusal: int) -> None:
    with pytest.raises(StorageError, match=f"/t/r/a could not be written: .*{os.strerror(refusal)}") as caught:
        write_sealed(root, recipients)
    assert str(root) not in str(caught.value)


@pytest.mark.skipif(unsupported() is not None, reason=f"system calls cannot be held: {unsupported()}")
@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EIO])
def test_encrypting_is_refused_any_of_its_changes_and_leaves_nothing(tmp_path: Path, refusal: int) -> None:
    recipients = [str(pyrage.x25519.Identity.generate().to_public())]

    calls = hold(partial(write_sealed, tmp_path / "whole", recipients), lambda _call: None).calls
    assert len(calls) > 15
    for number, call in enumerate(calls):
        root = tmp_path / str(number)

        def refuse(call: Call, at: int) -> int | None:
            return refusal if call.number == at else None

        ended = hold(partial(be_refused, root, recipients, refusal), partial(refuse, at=number))
        assert ended.exit_code == 0, f"{call.name}: {ended.said}"
        if call.name not in ("unlink", "unlinkat"):
            assert list(root.glob("t/r/*")) == [], call.name
