"""Many at once, slow ones, all back at once after a restart, and a long day: ``python -m faults.load [--short]``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tinker
from tinker import types

from faults.client import TOKENS, Client, Watch, allow_many_descriptors, head, loss, watching
from faults.live import KEY, MODEL, num_descriptors, rss_bytes, stalls_ms, tiny_server
from faults.record import Record, quantile
from faults.server import Server

HEALTHZ_P99_MS = 100.0
RSS_SLOPE_MB = 1.0
"""Of each of the two processes, for 1,000 operations."""
_OPENED_AT_ONCE = 200
_OF_A_RUN = 200
_HELD_S = 10.0
_KEPT_S = 30.0
"""For how long a soak's server keeps results at the longest. Until then memory only fills; from then on it is measured,
or from half of a shorter soak on."""


def waiting(num_futures: int, num_sdk_clients: int = 3) -> Record:
    """So many futures wait, a held connection each: operations behind a seq that does not come until all wait. A few
    clients with the real SDK work on meanwhile."""
    num_runs = max(num_futures // _OF_A_RUN, 1)
    with tiny_server(num_tenants=10) as server:
        with ThreadPoolExecutor() as threads:
            with watching(server) as watch:
                working = [threads.submit(_sdk_loop, server, n, 5) for n in range(num_sdk_clients)]
                served, held_s = asyncio.run(_wait_all(server, num_runs, num_futures // num_runs))
            num_steps = sum(work.result() for work in working)
        more = {"held_s": held_s, "sdk_steps": num_steps, "server_rss_mb": rss_bytes(server.pid) / 1e6}
        measured = {**_health(watch, server), **more}
    num_waiting = num_runs * (num_futures // num_runs)
    return Record("waiting futures", "held poll", num_waiting, num_waiting - served, measured, _unhealthy(watch))


async def _wait_all(server: Server, num_runs: int, num_each: int) -> tuple[int, float]:
    clients = [Client(server, tenant=n % 10) for n in range(num_runs)]
    runs = [await client.run() for client in clients]
    gate = asyncio.Semaphore(_OPENED_AT_ONCE)

    async def submit(number: int) -> list[str]:
        async with gate:
            fields = {"model_id": runs[number], "forward_input": loss(TOKENS)}
            return [await clients[number].accepted("forward", seq_id=2 + n, **fields) for n in range(num_each)]

    queued = await asyncio.gather(*(submit(number) for number in range(num_runs)))
    pollers = []
    for number, request_ids in enumerate(queued):
        for request_id in request_ids:
            pollers.append(asyncio.create_task(Client(server, number % 10).settled(request_id)))
            if len(pollers) % _OPENED_AT_ONCE == 0:
                await asyncio.sleep(0.1)
    began_s = time.monotonic()
    await asyncio.sleep(_HELD_S if num_runs > 10 else 1)  # all wait
    for run_id, client in zip(runs, clients, strict=True):
        client.close()  # the server may have closed it: it was idle for long
        await client.accepted("forward", model_id=run_id, seq_id=1, forward_input=loss(TOKENS))
    answers = await asyncio.gather(*pollers)
    return sum("error" not in answer for answer in answers), time.monotonic() - began_s


def _sdk_loop(server: Server, tenant: int, num_steps: int) -> int:
    """How many steps it made."""
    os.environ["TINKER_TELEMETRY"] = "0"
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY.format(tenant))
    training = client.create_lora_training_client(MODEL, rank=4).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=TOKENS[1:], dtype="int64")},
    )
    for _ in range(num_steps):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    sampler.sample(types.ModelInput.from_ints(TOKENS), 1, types.SamplingParams(max_tokens=4)).result()
    return num_steps


def slow_sockets(num_sockets: int) -> Record:
    """So many sockets drip a head, drip a body, or do not read what they asked for; all are to be closed, and whoever
    comes with them is to be served."""
    limit_s = 5.0 if num_sockets > 100 else 1.0
    options = f"[server]\nheader_timeout_s = {limit_s}\nbody_timeout_s = {limit_s}\n"
    with tiny_server(options=options) as server:
        before = num_descriptors(server.pid)
        with watching(server) as watch:
            num_open, num_steps = asyncio.run(_drip(server, num_sockets, limit_s))
        time.sleep(1)
        measured = {
            **_health(watch, server),
            "limit_s": limit_s,
            "operations_meanwhile": num_steps,
            "descriptors_more": num_descriptors(server.pid) - before,
        }
    return Record("slow sockets", "dripping socket", num_sockets, num_open, measured, _unhealthy(watch))


async def _drip(server: Server, num_sockets: int, limit_s: float) -> tuple[int, int]:
    """How many were still open well after the limit, and how many operations were done meanwhile."""
    tasks = [asyncio.create_task(_one_slow(server, number, limit_s)) for number in range(num_sockets)]
    client = Client(server)
    run_id, num_done = await client.run(), 0
    while not all(task.done() for task in tasks):
        num_done += 1
        await client.done("forward", model_id=run_id, seq_id=num_done, forward_input=loss(TOKENS))
    return sum(await asyncio.gather(*tasks)), num_done


async def _one_slow(server: Server, number: int, limit_s: float) -> bool:
    """True if the server let it go on for three times the limit."""
    kind = ("head", "body", "reader")[number % 3]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    until_s = time.monotonic() + 3 * limit_s
    if kind == "body":
        writer.write(head("/api/v1/create_session", KEY.format(0), 100_000))
    elif kind == "reader":
        writer.transport.get_extra_info("socket").setsockopt(1, 8, 4096)  # SO_RCVBUF
        reading = writer.transport
        assert isinstance(reading, asyncio.Transport)
        reading.pause_reading()
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    try:
        while time.monotonic() < until_s:
            if kind != "reader":
                writer.write(b"a")
            await asyncio.sleep(0.2)
            if kind == "reader":
                if _is_reset(writer):
                    return False
            elif writer.transport.is_closing() or reader.at_eof():
                return False
        return True
    except OSError:
        return False
    finally:
        writer.transport.abort()


def _is_reset(writer: asyncio.StreamWriter) -> bool:
    """Whether the other side has cut the connection, though nothing is read of it: its state is no more ESTABLISHED."""
    return bool(writer.transport.get_extra_info("socket").getsockopt(6, 11, 1)[0] != 1)


def reconnects(num_clients: int) -> Record:
    """So many clients wait when the server is killed; it starts again, and all come back at once."""
    num_runs = max(num_clients // _OF_A_RUN, 1)
    with tiny_server(num_tenants=10) as server:
        served, watch, seconds = asyncio.run(_come_back(server, num_runs, num_clients // num_runs))
        measured = {**_health(watch, server), "all_served_after_s": seconds}
    num_clients = num_runs * (num_clients // num_runs)
    return Record(
        "reconnects", "client of a killed server", num_clients, num_clients - served, measured, _unhealthy(watch)
    )


async def _come_back(server: Server, num_runs: int, num_each: int) -> tuple[int, Watch, float]:
    clients = [Client(server, tenant=n % 10) for n in range(num_runs)]
    runs = [await client.run() for client in clients]
    pollers = []
    for number, run_id in enumerate(runs):
        for seq_id in range(2, 2 + num_each):
            request_id = await clients[number].accepted(
                "forward", model_id=run_id, seq_id=seq_id, forward_input=loss(TOKENS)
            )
            pollers.append(asyncio.create_task(Client(server, number % 10).settled(request_id)))
    await asyncio.sleep(2)
    server.kill()
    await asyncio.to_thread(server.start)
    began_s = time.monotonic()
    with watching(server) as watch:
        for number, run_id in enumerate(runs):
            clients[number].close()
            await clients[number].post("forward", model_id=run_id, seq_id=1, forward_input=loss(TOKENS))
        answers = await asyncio.gather(*pollers)
    return sum("error" not in answer for answer in answers), watch, time.monotonic() - began_s


def soak(num_operations: int, num_clients: int = 4) -> Record:
    """So many operations, of a training loop that samples; what both processes hold must not grow with them."""
    options = f"[limits]\nresult_retention_s = 5\nunread_retention_s = {_KEPT_S:g}\n"
    with tiny_server(num_tenants=num_clients, options=options) as server:
        points = asyncio.run(_long_day(server, num_operations, num_clients))
    seconds, numbers = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    figures = np.array([point[2:] for point in points], float)
    late = seconds >= min(_KEPT_S, seconds[-1] / 2)
    slopes = np.polyfit(numbers[late] / 1000, figures[late], 1)[0]
    measured = {
        "measured_from_operation": float(numbers[late][0]),
        "server_mb_per_1000": slopes[0] / 1e6,
        "engine_mb_per_1000": slopes[1] / 1e6,
        "server_rss_mb": figures[-1, 0] / 1e6,
        "engine_rss_mb": figures[-1, 1] / 1e6,
        "server_descriptors_more": figures[-1, 2] - figures[late][0, 2],
        "engine_descriptors_more": figures[-1, 3] - figures[late][0, 3],
    }
    broken = [f"{name} grows by {measured[f'{name}_mb_per_1000']:.2f} MB" for name in ("server", "engine")]
    broken = [text for text, slope in zip(broken, slopes, strict=False) if slope > RSS_SLOPE_MB * 1e6]
    broken += [
        f"{name} has more descriptors" for name in ("server", "engine") if measured[f"{name}_descriptors_more"] > 2
    ]
    return Record("soak", "operation", int(numbers[-1]), 0, measured, tuple(broken))


async def _long_day(server: Server, num_operations: int, num_clients: int) -> list[tuple[float, ...]]:
    """After how many seconds and operations: memory of server and engine, descriptors of both."""
    points: list[tuple[float, ...]] = []
    began_s = time.monotonic()
    num_done = 0

    async def work(tenant: int) -> None:
        nonlocal num_done
        client = Client(server, tenant)
        run_id, sampler_id, seq_id = await client.run(), await client.sampler(), 0
        while num_done < num_operations:
            seq_id += 1
            operation = {"model_id": run_id, "seq_id": 2 * seq_id - 1}
            made = [await client.done("forward_backward", **operation, forward_backward_input=loss(TOKENS))]
            step = {"model_id": run_id, "seq_id": 2 * seq_id, "adam_params": {"learning_rate": 1e-4}}
            made.append(await client.done("optim_step", **step))
            prompt = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
            params = {"max_tokens": 4, "seed": seq_id}
            sample = {"sampling_session_id": sampler_id, "seq_id": seq_id, "num_samples": 1}
            made.append(await client.done("asample", **sample, prompt=prompt, sampling_params=params))
            failed = [answer["error"] for answer in made if "error" in answer]
            if failed:
                raise RuntimeError(failed[0])
            num_done += len(made)

    async def measure() -> None:
        every = max(num_operations // 40, 1)
        engine_pid = server.engine_pid()
        assert engine_pid is not None
        while num_done < num_operations:
            if num_done >= len(points) * every:
                pids = (server.pid, engine_pid)
                elapsed_s = time.monotonic() - began_s
                points.append((elapsed_s, num_done, *map(rss_bytes, pids), *map(num_descriptors, pids)))
            await asyncio.sleep(0.05)

    await asyncio.gather(measure(), *(work(tenant) for tenant in range(num_clients)))
    return points


def _health(watch: Watch, server: Server) -> dict[str, float]:
    return {
        "healthz_p50_ms": quantile(watch.healthz_ms, 0.5),
        "healthz_p99_ms": quantile(watch.healthz_ms, 0.99),
        "healthz_max_ms": max(watch.healthz_ms, default=0.0),
        "machine_p99_ms": quantile(watch.overslept_ms, 0.99),
        "stalls": float(len(stalls_ms(server))),
        "longest_stall_ms": max(stalls_ms(server), default=0.0),
    }


def _unhealthy(watch: Watch) -> tuple[str, ...]:
    found = []
    if quantile(watch.healthz_ms, 0.99) >= HEALTHZ_P99_MS:
        found.append(f"healthz p99 is not below {HEALTHZ_P99_MS:g} ms")
    if watch.num_unanswered:
        found.append(f"healthz gave no answer {watch.num_unanswered} times")
    return tuple(found)


EXPERIMENTS: dict[str, tuple[Callable[[int], Record], int, int]] = {
    "waiting": (waiting, 10_000, 500),
    "slow": (slow_sockets, 500, 60),
    "reconnects": (reconnects, 1_000, 100),
    "soak": (soak, 10_000, 300),
}
"""Each with how often, and how often in the short form."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.load", description=__doc__)
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS], help="default: all")
    parser.add_argument(
        "--short", action="store_true", help="a tenth or less of each, and no figure is judged: what was lost alone"
    )
    parser.add_argument("--times", type=int, help="how often, instead")
    parser.add_argument("--json", type=Path, help="write the records here too")
    chosen = parser.parse_args(arguments)
    allow_many_descriptors()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers end with us
    records = []
    for name in chosen.experiments or EXPERIMENTS:
        experiment, full, short = EXPERIMENTS[name]
        records.append(experiment(chosen.times or (short if chosen.short else full)))
        print(records[-1], flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([vars(record) for record in records], indent=1) + "\n")
    return int(any(record.lost if chosen.short else not record.holds for record in records))


if __name__ == "__main__":
    sys.exit(main())
