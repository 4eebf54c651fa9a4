from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tuft.errors import StorageError
from tuft.store.weights import files_to_hand_out, read_adapter, sweep, write_adapter, write_external
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
    size_bytes = write_adapter(tmp_path, "a/b", state(optimizer), "base")
    assert size_bytes == sum(path.stat().st_size for path in (tmp_path / "a/b").iterdir())
    assert_equal(read_adapter(tmp_path, "a/b", with_optimizer=True), state(optimizer))


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


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    file = tmp_path / "a/adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(StorageError, match="adapter_model.safetensors is damaged"):
        read_adapter(tmp_path, "a", with_optimizer=False)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    (tmp_path / "a/optimizer.safetensors").unlink()
    with pytest.raises(StorageError, match="optimizer.safetensors"):
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
    size_bytes = write_external(tmp_path, "b", state(optimizer=False), "base", None)
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


def test_the_configuration_is_pefts(tmp_path: Path) -> None:
    write_adapter(tmp_path, "a", state(), "base")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32.0)
    assert config["target_modules"] == ["q_proj"]
