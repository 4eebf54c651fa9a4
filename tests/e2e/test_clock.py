"""The machine's clock jumps, forward and back: nothing that was acknowledged is lost, and nobody is locked out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.conftest import TINY_MODEL, Launch, LiveServer, tiny_config
from tests.e2e.test_sdk_loop import TOKENS, datum, step

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
Jump = Callable[[str], None]


@pytest.fixture
def clock(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose clock runs as ``offset`` in the test's directory says."""
    if LIBRARY is None:
        reason = "libfaketime is not installed: apt-get install libfaketime"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    (tmp_path / "offset").write_text("+0")
    return {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(tmp_path / "offset"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


@pytest.fixture
def jump(tmp_path: Path) -> Jump:
    """``jump("+400d")``: the server's clock is so far off the machine's from now on."""

    def set_offset(offset: str) -> None:
        (tmp_path / "partial").write_text(offset)
        (tmp_path / "partial").rename(tmp_path / "offset")

    return set_offset


@pytest.fixture
def server(launch: Launch, tiny_model: Path, clock: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> LiveServer:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return launch(config=tiny_config(tiny_model), env=clock)


def wait_for_clock(server: LiveServer, offset: str) -> None:
    """The server's answers are dated by its clock, which it reads once a second."""
    expected = datetime.now(UTC) + timedelta(days=int(offset.removesuffix("d")))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        date = parsedate_to_datetime(httpx.get(f"{server.url}/api/v1/healthz").headers["date"])
        if abs(date - expected) < timedelta(hours=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"the server's clock says {date}, not {expected}")


@pytest.mark.slow
def test_training_sampling_and_results_outlive_jumps_of_the_clock(
    server: LiveServer, launch: Launch, tiny_model: Path, clock: dict[str, str], jump: Jump
) -> None:
    client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
    training = client.create_lora_training_client(TINY_MODEL, rank=4, seed=1).result()
    losses = [step(training, [datum()])]
    path = training.save_state("kept").result().path
    rest = client.create_rest_client()
    for offset in ("+400d", "-400d", "+1d"):
        computed = training.forward_backward([datum()], "cross_entropy")
        jump(offset)
        wait_for_clock(server, offset)
        assert computed.result().metrics["loss:sum"] > 0
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(step(training, [datum()]))
        sampler = training.save_weights_and_get_sampling_client().result()
        assert sampler.sample(types.ModelInput.from_ints(TOKENS), 1, types.SamplingParams(max_tokens=2)).result()
        assert [kept.tinker_path for kept in rest.list_user_checkpoints().result().checkpoints] == [path]
    assert losses == sorted(losses, reverse=True)

    jump("-30d")  # while no server runs
    assert server.stop() == 0
    again = launch(home=server.home, config=tiny_config(tiny_model), env=clock)
    client = tinker.ServiceClient(base_url=again.url, api_key=again.key)
    resumed = client.create_training_client_from_state_with_optimizer(path)
    assert step(resumed, [datum()]) < losses[0]
