"""The disk of the checkpoints is full, or loses what was written: what clients of the real SDK are told, and what goes
on. Needs a small disk (a mount), so root."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tinker

from tests.conftest import TINY_MODEL, TUFT, Launch, LiveServer, tiny_config
from tests.e2e.test_sdk_loop import datum, step
from tests.store.test_faults import fill, small_disk

STORAGE = "[storage]\nmin_free_bytes = 65536\n"


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Its checkpoints have a disk of their own, of 4 MiB."""
    home = tmp_path_factory.mktemp("home")
    with small_disk(home / "checkpoints", "4m"):
        running = launch(home=home, config=tiny_config(tiny_model, STORAGE))
        yield running
        running.stop()


@pytest.fixture(scope="module")
def disk(server: LiveServer) -> Path:
    return server.home / "checkpoints"


@pytest.fixture
def client(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> tinker.ServiceClient:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return tinker.ServiceClient(base_url=server.url, api_key=server.key)


@pytest.fixture
def training(client: tinker.ServiceClient) -> tinker.TrainingClient:
    training = client.create_lora_training_client(TINY_MODEL, rank=2, seed=1).result()
    step(training, [datum()])
    return training


@contextmanager
def full(disk: Path) -> Iterator[None]:
    ballast = fill(disk)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def out_of_inodes(disk: Path, but: int) -> Iterator[None]:
    """Bytes are free, but only so many more files can be made."""
    subprocess.run(["mount", "-o", "remount,nr_inodes=200", disk], check=True)
    made = []
    try:
        for number in range(201):
            try:
                (disk / f"ballast-{number}").touch()
            except OSError:
                break
            made.append(disk / f"ballast-{number}")
        for file in made[:but]:
            file.unlink()
        yield
    finally:
        for file in made:
            file.unlink(missing_ok=True)


def listed(client: tinker.ServiceClient) -> list[str]:
    found = client.create_rest_client().list_user_checkpoints(limit=1000).result().checkpoints
    return [checkpoint.tinker_path for checkpoint in found]


def loss(training: tinker.TrainingClient) -> float:
    return training.forward([datum()], "cross_entropy").result().metrics["loss:sum"]


def half_written(disk: Path) -> list[Path]:
    return list(disk.glob("**/.*"))


def verify(server: LiveServer, *words: str) -> subprocess.CompletedProcess[str]:
    """Beside the running server."""
    command = [TUFT, "checkpoint", "verify", *words, "--home", server.home, "--config", server.home / "tuft.toml"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_save_that_the_disk_has_no_room_for_is_refused_with_numbers_and_training_goes_on(
    client: tinker.ServiceClient, training: tinker.TrainingClient, disk: Path, server: LiveServer
) -> None:
    before = listed(client)
    with full(disk):
        with pytest.raises(tinker.RequestFailedError) as refused:
            training.save_state("x").result()
        said = str(refused.value)
        assert "could not be written: the disk is full (the last 65,536 bytes are kept free): it needs about" in said
        assert "bytes, and 0 are free in the server's 'checkpoints' directory" in said
        assert str(server.home) not in said
        with pytest.raises(tinker.RequestFailedError, match="the disk is full"):
            training.save_weights_for_sampler("x").result()
        with pytest.raises(tinker.RequestFailedError, match="the disk is full"):
            training.save_weights_and_get_sampling_client().result()
        first = loss(training)
        step(training, [datum()])
        assert loss(training) < first, "it learns"
        assert half_written(disk) == []
        assert listed(client) == before
    path = training.save_state("x").result().path
    assert listed(client) == [path, *before]
    other = client.create_training_client_from_state_with_optimizer(path).result()
    assert loss(other) == loss(training)
    training.save_weights_and_get_sampling_client().result()


@pytest.mark.parametrize("room_for", [0, 1, 2, 4])
def test_a_save_that_runs_out_of_room_half_way_leaves_nothing_and_what_had_the_name_stays(
    client: tinker.ServiceClient, training: tinker.TrainingClient, disk: Path, room_for: int
) -> None:
    """Free bytes do not predict it: the disk has no more files to give; a save takes five."""
    path = training.save_state("kept").result().path
    kept = loss(training)
    step(training, [datum()])
    with out_of_inodes(disk, but=room_for):
        with pytest.raises(tinker.RequestFailedError, match="could not be written: No space left on device: it needs"):
            training.save_state("kept", overwrite=True).result()
        assert half_written(disk) == []
        assert path in listed(client)
        assert loss(client.create_training_client_from_state(path).result()) == kept
    training.save_state("kept", overwrite=True).result()
    assert loss(client.create_training_client_from_state(path).result()) == loss(training) != kept


def test_a_flipped_bit_is_told_of_by_name_and_a_mended_file_brings_its_checkpoint_back(
    client: tinker.ServiceClient, training: tinker.TrainingClient, disk: Path, server: LiveServer
) -> None:
    path, whole = training.save_state("bit").result().path, training.save_state("whole").result().path
    run_id = training.get_info().model_id
    (file,) = disk.glob(f"*/{run_id}/bit-*/adapter_model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert path in listed(client), "nobody has read it yet"

    with pytest.raises(
        tinker.RequestFailedError, match="adapter_model.safetensors is damaged.*load another checkpoint"
    ):
        training.load_state(path).result()
    assert path not in listed(client)
    assert whole in listed(client)
    for ask in (
        lambda: client.create_training_client_from_state(path).result(),
        lambda: client.create_sampling_client(model_path=path).result(),
        lambda: client.create_rest_client().get_weights_info_by_tinker_path(path).result(),
    ):
        with pytest.raises(tinker.UnprocessableEntityError, match=f"{path} is damaged: .*adapter_model.safetensors"):
            ask()
    step(training, [datum()])

    told = verify(server)
    assert told.returncode == 1
    assert path in told.stdout
    assert whole not in told.stdout
    file.write_bytes(content)
    told = verify(server, path, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["damaged"] == []
    assert path in listed(client)
    training.load_state(path).result()
    file.unlink()
    assert path not in listed(client), "of a file that is gone, a list tells at once"
    client.create_rest_client().delete_checkpoint_from_tinker_path(path).result()
