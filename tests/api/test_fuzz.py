"""Whatever a client sends, the server neither stumbles (5xx) nor loses its run, nor keeps what it was sent.

``TUFT_FUZZ=10000 pytest tests/api/test_fuzz.py -s`` (``make fuzz``) sends so many requests to a server of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from schemathesis.generation import GenerationMode

from tests.api.calls import BASE_MODEL, LIMIT_BYTES, TOKENS, cross_entropy, post, result
from tests.api.conftest import Served
from tests.api.fuzzing import EXTREMES, REQUESTS, VALUES, Attacker, places, value_at
from tests.conftest import TINY_MODEL, Launch, tiny_config

NUM_REQUESTS = int(os.environ.get("TUFT_FUZZ", 300))
WARM_UP = 500
MAX_GROWTH_BYTES = 50 * 2**20
REQUESTS_OF_A_CLIENT = 100
quietly = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def attacker(server: Served) -> Iterator[Attacker]:
    """Alice."""
    attacker = Attacker(server.alice, BASE_MODEL, LIMIT_BYTES)
    attacker.begin()
    yield attacker
    attacker.end()


@pytest.mark.parametrize("label", sorted(REQUESTS))
@settings(quietly, max_examples=8)
@given(data=st.data())
def test_no_json_makes_the_server_stumble(attacker: Attacker, label: str, data: DataObject) -> None:
    attacker.json(label, data.draw(st.sampled_from(places(REQUESTS[label]))), data.draw(VALUES))
    assert not attacker.faults


NUMBERS = [
    (label, place)
    for label, request in sorted(REQUESTS.items())
    for place in places(request)
    if type(value_at(request, place)) in (int, float) and place[-1] not in (1, 2, 3, 4)
]


def test_no_number_is_too_large_or_too_small(attacker: Attacker) -> None:
    extremes = cycle(EXTREMES)  # six at each place: as many as there is time for
    for label, place in NUMBERS:
        for extreme in islice(extremes, 6):
            attacker.json(label, place, extreme)
    assert not attacker.faults


@settings(quietly, max_examples=150)
@given(rng=st.randoms(use_true_random=True), mangle=st.booleans(), compress=st.booleans())
def test_no_protobuf_makes_the_server_stumble(
    attacker: Attacker, rng: random.Random, mangle: bool, compress: bool
) -> None:
    attacker.proto(rng, mangle=mangle, compress=compress)
    assert not attacker.faults


def test_a_run_survives_what_was_refused(server: Served, run_id: str) -> None:
    for seq_id in (1, 2):
        post(server.alice, "optim_step", model_id=run_id, seq_id=seq_id, adam_params={"beta1": [seq_id]})
    done = post(server.alice, "forward", model_id=run_id, seq_id=3, forward_input=cross_entropy(TOKENS))
    assert "metrics" in result(server.alice, done)


@pytest.mark.slow
@pytest.mark.timeout(300 + NUM_REQUESTS)
def test_many_mutated_requests_neither_hurt_the_server_nor_stay_in_its_memory(launch: Launch, tiny_model: Path) -> None:
    limits = (
        f"[server]\nlong_poll_s = 0.2\n[limits]\nmax_request_bytes = {LIMIT_BYTES}\n"
        "result_retention_s = 10\nunread_retention_s = 30\n"  # what is kept for a time on purpose is no growth
    )
    live = launch(config=tiny_config(tiny_model, limits), env={"TUFT_ENGINE__NUM_THREADS": "1"})
    with httpx.Client(base_url=live.url, headers={"X-API-Key": live.key}, timeout=60) as client:
        attacker = Attacker(client, TINY_MODEL, LIMIT_BYTES)
        sizes: list[dict[str, int]] = []
        num_sent = 0

        @settings(quietly, max_examples=NUM_REQUESTS + WARM_UP if "TUFT_FUZZ" in os.environ else NUM_REQUESTS)
        @given(data=st.data())
        def attack(data: DataObject) -> None:
            nonlocal num_sent
            if num_sent % REQUESTS_OF_A_CLIENT == 0:
                if num_sent:
                    attacker.end()
                attacker.begin()
            if num_sent in (min(WARM_UP, NUM_REQUESTS // 2), WARM_UP + NUM_REQUESTS // 2):
                sizes.append(resident_bytes(live.process.pid))
            one_of_any_kind(attacker, described, data)
            num_sent += 1

        described = operations(live.url)
        attack()
        sizes.append(resident_bytes(live.process.pid))
    for answer, times in sorted(attacker.statuses.items()):
        print(f"{times:7} {answer}")
    print(*sizes, sep="\n")
    assert not attacker.faults, "\n".join(attacker.faults[:20])
    assert sum(sizes[-1].values()) - sum(sizes[0].values()) < MAX_GROWTH_BYTES


def one_of_any_kind(attacker: Attacker, described: st.SearchStrategy[Any], data: DataObject) -> None:
    kind = data.draw(st.sampled_from(["json", "json", "json", "proto", "zstd", "described", "described"]))
    if kind == "json":
        label = data.draw(st.sampled_from(sorted(REQUESTS)))
        place = data.draw(st.sampled_from(places(REQUESTS[label])))
        is_right = data.draw(st.integers(0, 3)) == 0  # what is to be refused comes between what is to be done
        attacker.json(label, place, value_at(REQUESTS[label], place) if is_right else data.draw(VALUES))
    elif kind == "described":
        send_described(attacker, data.draw(described), data.draw(st.booleans()))
    else:
        rng = random.Random(data.draw(st.integers(0, 2**64)))
        attacker.proto(rng, mangle=data.draw(st.booleans()), compress=kind == "zstd")


# --- what the OpenAPI document says -----------------------------------------------------------------------------------

NAMED = {
    "session_id": "SESSION",
    "model_id": "RUN",
    "run_id": "RUN",
    "sampling_session_id": "SAMPLER",
    "sampler_id": "SAMPLER",
    "base_model": "MODEL",
    "path": "CHECKPOINT",
    "tinker_path": "CHECKPOINT",
    "source_path": "CHECKPOINT",
    "request_id": "FUTURE",
}


def operations(url: str) -> st.SearchStrategy[Any]:
    """Cases of all operations of the document, most of them as it allows, some not."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    strategies = [
        operation.ok().as_strategy(generation_mode=mode)
        for operation in schema.get_all_operations()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if operation.ok().method.upper() != "DELETE" or "apikey" not in operation.ok().path
    ]
    return st.one_of(strategies)


def send_described(attacker: Attacker, case: Any, is_named: bool) -> None:
    """``is_named``: with ids of things that exist."""
    seq_of = None
    if is_named:
        for part in (case.body, case.path_parameters):
            if isinstance(part, dict):
                part.update({key: attacker.names[name] for key, name in NAMED.items() if key in part})
                if "seq_id" in part and "model_id" in part:
                    seq_of = attacker.names["RUN"]
                    part["seq_id"] = attacker.next_seq[seq_of]
    request = requests.Request(**case.as_transport_kwargs(base_url="http://server")).prepare()
    content = request.body or b""
    attacker.send(
        str(request.method),
        str(request.path_url),
        content.encode() if isinstance(content, str) else content,
        {"Content-Type": request.headers.get("Content-Type", "application/json")},
        seq_of=seq_of,
        wait=seq_of is not None,
    )


@pytest.fixture(scope="module")
def described(server: Served) -> st.SearchStrategy[Any]:
    return operations(server.url)


def test_nothing_that_the_document_describes_makes_the_server_stumble(
    attacker: Attacker, described: st.SearchStrategy[Any]
) -> None:
    @settings(quietly, max_examples=150)
    @given(case=described, is_named=st.booleans())
    def attack(case: Any, is_named: bool) -> None:
        send_described(attacker, case, is_named)
        assert not attacker.faults

    attack()


def resident_bytes(pid: int) -> dict[str, int]:
    """Of the server's process and its children, by process id and name."""
    sizes = {}
    for process in (pid, *children(pid)):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        sizes[f"{process} {status['Name'].strip()}"] = int(status["VmRSS"].split()[0]) * 1024
    return sizes


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return found + [deeper for child in found for deeper in children(child)]
