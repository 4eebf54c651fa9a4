"""The official SDK in its releases, unmodified, against one server: each does everything, and all get the same numbers.

SDK_VERSIONS=all (`make test-sdk`) runs every release below, SDK_VERSIONS="0.16.1 0.19.0" those two; without it run the
oldest, a middle one and the newest.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_MODEL, LiveServer
from tests.sdk.venvs import venv_python

RELEASES = ("0.8.1", "0.16.1", "0.19.0", "0.22.7", "0.25.0", "0.30.4", "0.36.0", "0.38.0")
"""Where the wire changed: JSON alone, 0.19 answers in protobuf, 0.25 asks in it, 0.36 has what is new."""
NEWEST = RELEASES[-1]
USUAL = (RELEASES[0], "0.25.0", NEWEST)
WANTED = os.environ.get("SDK_VERSIONS", "")
CHOSEN = {"": USUAL, "all": RELEASES}.get(WANTED) or tuple(WANTED.split())
SCRIPT = Path(__file__).with_name("script.py")


@cache
def told_by(sdk: str, url: str, key: str) -> dict[str, Any]:
    """What the script says that this release of the SDK saw."""
    python = venv_python(f"tinker-{sdk}", f"tinker=={sdk}")
    # to SDKs before 0.18 a key in the environment is worth more than one in the call
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    done = subprocess.run(
        [python, "-W", "ignore", SCRIPT, url, key, TINY_MODEL],
        capture_output=True,
        text=True,
        timeout=180,
        env={**environment, "TINKER_TELEMETRY": "0"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
@pytest.mark.parametrize("sdk", CHOSEN)
@pytest.mark.calls("POST /api/v1/forward")
def test_each_sdk_does_everything_and_gets_the_newest_ones_numbers(tiny_server: LiveServer, sdk: str) -> None:
    told = told_by(sdk, tiny_server.url, tiny_server.key)
    assert told["checkpoints"] == ["sampler_weights/middle", "weights/middle"]
    assert told == {**told_by(NEWEST, tiny_server.url, tiny_server.key), "sdk": sdk}
