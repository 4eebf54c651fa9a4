"""One tenant queues thousands, another sends one a second; and tenants of equal and of other weights share the engine.

python -m faults.fairness [--queued 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx

from faults.client import Client, allow_many_descriptors, loss
from faults.live import KEY, tiny_server
from faults.record import Record, quantile
from faults.server import Server
from tuft.fairness import jain_index

_TOKENS = list(range(10, 210))
_NUM_PROBES = 40  # the server collects garbage once a minute: that one may be late
_NUM_CONNECTIONS = 8
_PASS_TOKENS = 1024
JAIN, WEIGHT_ERROR = 0.95, 0.10


def crowd(num_queued: int) -> Record:
    """The latency of one operation a second, alone and beside a tenant who has so many queued."""
    with tiny_server(num_tenants=2) as server:
        measured = asyncio.run(_beside_a_crowd(server, num_queued))
    bound_ms = 2 * measured["solo_p95_ms"] + measured["micro_batch_ms"]
    broken = () if measured["p95_ms"] <= bound_ms else (f"p95 is over {bound_ms:.0f} ms: twice solo and a micro-batch",)
    return Record("one beside a crowd", "operation queued by another", num_queued, 0, measured, broken)


async def _beside_a_crowd(server: Server, num_queued: int) -> dict[str, float]:
    one = Client(server, tenant=1)
    run_id = await one.run()
    await _timed(one, run_id, 1, 3)  # whatever happens once has happened
    solo = await _timed(one, run_id, 4, _NUM_PROBES)
    pass_s = min([await _pass(one, run_id, 4 + _NUM_PROBES + n) for n in range(5)])
    await _queue(server, 0, num_queued)
    beside = await _timed(one, run_id, 9 + _NUM_PROBES, _NUM_PROBES)
    left = _num_waiting(server, 0)
    return {
        "solo_p95_ms": quantile(solo, 0.95) * 1e3,
        "p95_ms": quantile(beside, 0.95) * 1e3,
        "p50_ms": quantile(beside, 0.5) * 1e3,
        "micro_batch_ms": pass_s * 1e3,
        "still_queued_at_the_end": float(left),
    }


def shares(num_queued: int) -> Record:
    """Three tenants of equal weight, then two of weights 1 and 3, each with so many queued: who was served how much
    while all wanted something."""
    with tiny_server(num_tenants=3) as server:
        equal = asyncio.run(_served(server, [0, 1, 2], num_queued))
    weights = '[fairness.weights]\n"tenant-1" = 3.0\n'
    with tiny_server(num_tenants=2, options=weights) as server:
        light, heavy = asyncio.run(_served(server, [0, 1], num_queued))
    measured = {"jain_index": jain_index(equal), "share_of_weight_3": heavy / light}
    broken = [] if measured["jain_index"] >= JAIN else [f"the Jain index is below {JAIN}"]
    broken += [] if abs(heavy / light / 3 - 1) <= WEIGHT_ERROR else ["weights 1:3 do not give 1:3 within 10 %"]
    return Record("shares", "operation queued", 5 * num_queued, 0, measured, tuple(broken))


async def _served(server: Server, tenants: Sequence[int], num_queued: int) -> list[float]:
    await asyncio.gather(*(_queue(server, tenant, num_queued) for tenant in tenants))
    before = [_num_waiting(server, tenant) for tenant in tenants]
    while min(now := [_num_waiting(server, tenant) for tenant in tenants]) > num_queued / 10:
        last = now
        await asyncio.sleep(0.05)
    return [float(began - ended) for began, ended in zip(before, last, strict=True)]


async def _queue(server: Server, tenant: int, number: int) -> None:
    """So many operations of a run, behind a seq that comes last: all are there when the first begins."""
    clients = [Client(server, tenant) for _ in range(_NUM_CONNECTIONS)]
    run_id = await clients[0].run()

    async def send(first: int) -> None:
        for seq in range(first, number + 2, _NUM_CONNECTIONS):
            await clients[first % _NUM_CONNECTIONS].accepted("forward_backward", **_operation(run_id, seq))

    await asyncio.gather(*(send(2 + n) for n in range(_NUM_CONNECTIONS)))
    await clients[0].accepted("forward_backward", **_operation(run_id, 1))


async def _timed(client: Client, run_id: str, first_seq: int, number: int) -> list[float]:
    """Seconds that each took; one is sent a second."""
    times = []
    for seq in range(first_seq, first_seq + number):
        began_s = time.perf_counter()
        answer = await client.done("forward_backward", **_operation(run_id, seq))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        times.append(time.perf_counter() - began_s)
        await asyncio.sleep(max(0.0, 1.0 - times[-1]) if number > 5 else 0.0)
    return times


async def _pass(client: Client, run_id: str, seq: int) -> float:
    """Seconds for a full pass, alone."""
    fields = loss(_TOKENS)
    fields["data"] *= _PASS_TOKENS // len(_TOKENS)
    fields["data"] = [_moved(datum, n) for n, datum in enumerate(fields["data"])]
    began_s = time.perf_counter()
    await client.done("forward_backward", model_id=run_id, seq_id=seq, forward_backward_input=fields)
    return time.perf_counter() - began_s


def _moved(datum: dict[str, Any], number: int) -> dict[str, Any]:
    """The same tokens in another order: no common beginning that would be computed once."""
    (chunk,) = datum["model_input"]["chunks"]
    tokens = chunk["tokens"][number:] + chunk["tokens"][:number]
    return {**datum, "model_input": {"chunks": [{"tokens": tokens}]}}


def _operation(run_id: str, seq: int) -> dict[str, Any]:
    return {"model_id": run_id, "seq_id": seq, "forward_backward_input": loss(_TOKENS)}


def _num_waiting(server: Server, tenant: int) -> int:
    answer = httpx.get(f"{server.url}/api/v1/queue?limit=0", headers={"X-API-Key": KEY.format(tenant)}, timeout=30)
    return int(answer.raise_for_status().json()["num_waiting"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, default=10_000)
    arguments = parser.parse_args()
    allow_many_descriptors()
    print(crowd(arguments.queued))
    print(shares(arguments.queued // 10))


if __name__ == "__main__":
    main()
