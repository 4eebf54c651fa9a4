"""One tenant of the SDK has a crowd of operations queued; another's, one at a time, are served between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest
import tinker

from tests.conftest import TINY_MODEL, LiveServer
from tests.e2e.test_sdk_loop import datum

pytestmark = pytest.mark.slow

NUM_QUEUED, NUM_PROBES = 120, 8
MOST_BETWEEN = 8
"""Operations of the crowd, each a pass: one runs when the other's comes, and some end while its result travels."""
CROWD = [datum([10 + (29 * number + place) % 300 for place in range(251)]) for number in range(4)]
PROBE = [datum(list(range(10, 60)))]


def num_waiting(server: LiveServer, key: str) -> int:
    answer = httpx.get(f"{server.url}/api/v1/queue?limit=0", headers={"X-API-Key": key}, timeout=30)
    return int(answer.raise_for_status().json()["num_waiting"])


def last_seq(server: LiveServer, key: str) -> int:
    """Of those that wait."""
    answer = httpx.get(f"{server.url}/api/v1/queue?limit=1000", headers={"X-API-Key": key}, timeout=30)
    return max((one["seq"] for one in answer.raise_for_status().json()["waiting"]), default=0)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_operation_at_a_time_is_served_between_those_of_a_crowd(
    tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    keys = [tiny_server.create_key(tenant) for tenant in ("crowd", "single")]
    crowd, single = (
        tinker.ServiceClient(base_url=tiny_server.url, api_key=key).create_lora_training_client(TINY_MODEL, rank=4)
        for key in keys
    )
    alone = single.forward_backward(PROBE, "cross_entropy").result().metrics["loss:sum"]

    queued = [crowd.forward_backward(CROWD, "cross_entropy") for _ in range(NUM_QUEUED)]
    wait_until(lambda: last_seq(tiny_server, keys[0]) >= NUM_QUEUED)
    between = []
    for _ in range(NUM_PROBES):
        before = num_waiting(tiny_server, keys[0])
        metrics = single.forward_backward(PROBE, "cross_entropy").result().metrics
        between.append(before - num_waiting(tiny_server, keys[0]))
        assert metrics["loss:sum"] == alone  # the crowd changes nothing of it
    left = num_waiting(tiny_server, keys[0])

    assert left > 0  # so each was served before the crowd was
    assert sorted(between)[NUM_PROBES // 2] <= MOST_BETWEEN
    assert sum(between) > 0  # and the crowd goes on meanwhile
    assert len({future.result().metrics["loss:sum"] for future in queued}) == 1
    assert num_waiting(tiny_server, keys[0]) == 0
