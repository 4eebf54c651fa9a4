"""A steady mix of tenants, each with several requests queued: what each is told of its wait, and how long it waits.

Every tenant sends the next request when one of its own has its result; of those who train, two take a step after each
loss. A wait is judged by the first ETA that ``GET /api/v1/queue`` tells of it, which is asked for twice a second: what
was left of the wait then, against it. Waits of less than a second are left out: what ETAs are told from may be a
quarter of one old.

python -m faults.waits [--waits 500]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from faults.client import TOKENS, Client, loss
from faults.live import KEY, tiny_server
from faults.record import Record, quantile
from faults.server import Server

PROMISE, NEAR = 0.9, 0.25
_DEPTH = 10
_POLL_S = 0.5
_WARM_UP_S = 20.0
_SHORTEST_S = 1.0
_NUM_TOKENS = 400
_DATA = (2, 6, 16)
"""Of an operation of each tenant who trains; one more samples."""
_STEPPING = (0, 1)
_SAMPLE = {"prompt": {"chunks": [{"tokens": TOKENS}]}, "num_samples": 8}
_OPTIONS = "[engine]\nmax_decode_rows = 16\n"

Send = Callable[[Client, int], Awaitable[str]]


@dataclass
class _Told:
    """Seconds that each request was told to wait, and when; and when it ended."""

    told: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    ended_s: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def judged(self, begin_s: float, number: int) -> list[str]:
        """The first so many that were told of after ``begin_s``."""
        return [one for one, told in self.told.items() if told[0][0] >= begin_s][:number]

    def ratios(self, judged: Sequence[str], pick: Callable[[int], int]) -> dict[str, float]:
        """Of the wait that was left, what was told; of each request, the telling that ``pick`` chooses from so many."""
        found = {}
        for request_id in judged:
            then_s, eta_s = self.told[request_id][pick(len(self.told[request_id]))]
            left_s = self.ended_s[request_id] - then_s
            if left_s >= _SHORTEST_S:
                found[request_id] = eta_s / left_s
        return found


def steady(num_waits: int) -> Record:
    """So many waits, after the mix has become steady."""
    with tiny_server(num_tenants=len(_DATA) + 1, options=_OPTIONS) as server:
        seen, judged = asyncio.run(_mix(server, num_waits))
    first = seen.ratios(judged, lambda _: 0)
    later = seen.ratios(judged, lambda number: number // 2)
    waits = [seen.ended_s[one] - seen.told[one][0][0] for one in first]
    measured = {"within_25_percent_when_first_told": _near(first), "halfway": _near(later)}
    for kind in ("train", "sample"):
        ratios = {one: ratio for one, ratio in first.items() if seen.kinds[one] == kind}
        measured |= {f"{kind}_waits": float(len(ratios)), f"{kind}_within_25_percent": _near(ratios)}
    measured |= {f"told_to_real_p{n}": round(quantile(list(first.values()), n / 100), 2) for n in (5, 50, 95)}
    measured |= {"wait_p50_s": round(quantile(waits, 0.5), 2), "wait_max_s": round(max(waits), 2)}
    broken = () if _near(first) >= PROMISE else (f"fewer than {PROMISE:.0%} of the waits are within {NEAR:.0%}",)
    return Record("a steady mix", "wait", len(first), 0, measured, broken)


def _near(ratios: dict[str, float]) -> float:
    near = sum(abs(ratio - 1) <= NEAR for ratio in ratios.values())
    return round(near / len(ratios), 3) if ratios else 0.0


async def _mix(server: Server, num_waits: int) -> tuple[_Told, list[str]]:
    """What was told and seen, and which waits are judged: they began when the mix was steady, and all have ended."""
    seen = _Told()
    senders: list[asyncio.Task[None]] = []
    for tenant in range(len(_DATA) + 1):
        send = await (_trainer(server, tenant) if tenant < len(_DATA) else _sampler(server, tenant))
        kind = "train" if tenant < len(_DATA) else "sample"
        seqs, clients = count(1), [Client(server, tenant) for _ in range(_DEPTH)]
        senders += [asyncio.create_task(_keep(client, send, kind, seen, seqs)) for client in clients]
    begin_s = time.monotonic() + _WARM_UP_S
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as asked:
        judged: list[str] = []
        while len(judged) < num_waits or not all(one in seen.ended_s for one in judged):
            judged = seen.judged(begin_s, num_waits)
            for tenant in range(len(_DATA) + 1):
                await _ask(asked, tenant, seen)
            for task in senders:
                if task.done():
                    task.result()
            await asyncio.sleep(_POLL_S)
    for task in senders:
        task.cancel()
    await asyncio.gather(*senders, return_exceptions=True)
    return seen, judged


async def _ask(asked: httpx.AsyncClient, tenant: int, seen: _Told) -> None:
    answer = (await asked.get("/api/v1/queue", headers={"X-API-Key": KEY.format(tenant)})).raise_for_status().json()
    now_s = time.monotonic()
    for one in answer["waiting"]:
        if one["eta_s"] is not None:
            seen.told.setdefault(one["request_id"], []).append((now_s, one["eta_s"]))


async def _keep(client: Client, send: Send, kind: str, seen: _Told, seqs: count[int]) -> None:
    """One request after the other, for ever."""
    while True:
        request_id = await send(client, next(seqs))
        answer = await client.settled(request_id)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        seen.kinds[request_id] = kind
        seen.ended_s[request_id] = time.monotonic()


async def _trainer(server: Server, tenant: int) -> Send:
    run_id = await Client(server, tenant).run()

    async def send(client: Client, seq: int) -> str:
        if tenant in _STEPPING and seq % 2 == 0:
            return await client.accepted("optim_step", model_id=run_id, seq_id=seq, adam_params={"learning_rate": 1e-4})
        fields = loss([10 + (seq + n) % 300 for n in range(_NUM_TOKENS)])
        fields["data"] = [_moved(fields["data"][0], n) for n in range(_DATA[tenant])]
        return await client.accepted("forward_backward", model_id=run_id, seq_id=seq, forward_backward_input=fields)

    return send


def _moved(datum: dict[str, Any], number: int) -> dict[str, Any]:
    """The same tokens in another order: no common beginning that would be computed once."""
    (chunk,) = datum["model_input"]["chunks"]
    tokens = chunk["tokens"][number:] + chunk["tokens"][:number]
    return {**datum, "model_input": {"chunks": [{"tokens": tokens}]}}


async def _sampler(server: Server, tenant: int) -> Send:
    sampler_id = await Client(server, tenant).sampler()

    async def send(client: Client, seq: int) -> str:
        params = {"max_tokens": 64 + 32 * (seq % 3), "seed": seq}
        return await client.accepted(
            "asample", sampling_session_id=sampler_id, seq_id=seq, sampling_params=params, **_SAMPLE
        )

    return send


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waits", type=int, default=500)
    print(steady(parser.parse_args().waits))


if __name__ == "__main__":
    main()
