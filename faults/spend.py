"""Requests race for the last of a spend cap while the server is killed and comes back: nothing is spent beyond the cap,
and the ledger holds every token that was told, once.

    python -m faults.spend [--short]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.client import Client, allow_many_descriptors
from faults.live import tiny_server
from faults.record import Record
from faults.server import Server

_NUM_CLIENTS = 50
_PREFILL, _SAMPLE = 5.0, 40.0
_PRICES = f"[prices]\nprefill = {_PREFILL}\ncached_prefill = {_PREFILL}\nsample = {_SAMPLE}\n"
_MOST_PROMPT, _MOST_SAMPLED = 8, 8
_SHARE = 0.3
"""Of what all requests would cost at most: so much the cap allows."""


def races(num_requests: int) -> Record:
    """So many samples at once, of several prices, of which the cap has room for some."""
    dearest = (_MOST_PROMPT * _PREFILL + _MOST_SAMPLED * _SAMPLE) / 1e6
    cap = round(_SHARE * num_requests * dearest / 2, 6)
    with tiny_server(options=f"{_PRICES}[quotas]\nspend_total = {cap}\n") as server:
        told = asyncio.run(_race(server, num_requests))
        (row,) = _ledger(server)
    num_tokens = sum(prompt + len(sampled) for prompt, sampled in told.accepted)
    num_over = -(-max(row["cost"] - cap, 0.0) // dearest)
    lost = told.num_failed + abs(num_tokens - int(row["tokens"]))
    broken = [] if num_over <= 1 else [f"{num_over:g} operations over the cap"]
    broken += [] if told.num_refused else ["the cap refused nothing: give more requests"]
    measured = {
        "cap": cap,
        "spent": row["cost"],
        "operations_over": num_over,
        "accepted": float(len(told.accepted)),
        "refused": float(told.num_refused),
        "kills": 1.0,
        "tokens_told": float(num_tokens),
        "tokens_in_ledger": float(row["tokens"]),
    }
    return Record("spend races", "sample at the cap", num_requests, lost, measured, tuple(broken))


class _Told:
    """Of accepted ones, the length of the prompt and what was sampled. ``enough`` of them, and it is under way."""

    def __init__(self, enough: float) -> None:
        self._enough = enough
        self.accepted: list[tuple[int, list[int]]] = []
        self.num_refused = self.num_failed = 0
        self.is_under_way = asyncio.Event()

    def accept(self, num_prompt: int, sampled: list[int]) -> None:
        self.accepted.append((num_prompt, sampled))
        if len(self.accepted) >= self._enough:
            self.is_under_way.set()


async def _race(server: Server, num_requests: int) -> _Told:
    told, dice = _Told(num_requests * _SHARE / 4), random.Random(0)
    sampler = await Client(server).sampler()
    clients = [Client(server) for _ in range(_NUM_CLIENTS)]

    async def ask(client: Client, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            prompt = list(range(10, 10 + dice.randint(1, _MOST_PROMPT)))
            params = {"max_tokens": dice.randint(1, _MOST_SAMPLED), "stop": [], "seed": seq_id}
            fields = {"seq_id": seq_id, "prompt": {"chunks": [{"tokens": prompt}]}, "sampling_params": params}
            await _one(client, told, len(prompt), sampling_session_id=sampler, num_samples=1, **fields)

    async def kill() -> None:
        await told.is_under_way.wait()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)

    shares = [range(first, num_requests, _NUM_CLIENTS) for first in range(_NUM_CLIENTS)]
    await asyncio.gather(kill(), *(ask(client, share) for client, share in zip(clients, shares, strict=True)))
    for client in clients:
        client.close()
    return told


async def _one(client: Client, told: _Told, num_prompt: int, **fields: Any) -> None:
    """As the SDK asks: the same again while the server is away; a refusal counts, and is left at that."""
    while True:
        try:
            status, answer = await client.post("asample", **fields)
        except (OSError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.1)
            continue
        if status < 500:
            break
        await asyncio.sleep(0.1)
    if status == 429:
        told.num_refused += 1
        return
    result = {} if status != 200 else await client.settled(answer["request_id"])
    if "sequences" in result:
        told.accept(num_prompt, result["sequences"][0]["tokens"])
    else:
        told.num_failed += 1


def _ledger(server: Server) -> list[dict[str, Any]]:
    """What `tuft usage` says, from the database beside the server."""
    command = [sys.executable, "-m", "tuft", "usage", "--by", "tenant", "--json", "--home", str(server.home)]
    command += ["--config", str(server.home / "tuft.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.spend", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few hundred races")
    parser.add_argument("--times", type=int, help="how many, instead")
    parser.add_argument("--json", type=Path, help="write the record here too")
    chosen = parser.parse_args(arguments)
    allow_many_descriptors()
    record = races(chosen.times or (300 if chosen.short else 1000))
    print(record, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([vars(record)], indent=1) + "\n")
    return int(not record.holds)


if __name__ == "__main__":
    sys.exit(main())
