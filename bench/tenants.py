"""Many tenants on one server, each with the real SDK: throughput, latency of each, and memory.

    python -m bench.tenants [--tenants 1 2 4 8 16 64] [--small] [--rounds 2]

For every number of tenants a fresh server, so that its peak memory is its own. In a round all tenants submit one step
(forward_backward of 4 x 256 tokens and optim_step) at the same instant, each in a thread of its own; a tenant's latency
lasts until it has both results. The clients run beside the server on the same cores. Before, in the same run: the floor
(bf16 products alone) and transformers + peft for one tenant's step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Barrier

import tinker
from tinker import types

from bench import baselines
from bench.live import peak_rss_bytes, running_server, sdk_data, training_client
from bench.measure import Variant, measure
from bench.report import Judged, arguments, judged_table, publish, table
from bench.workloads import BaseModel, Text, Training, equal
from tuft.types import LoraSpec

MODULE = "bench.tenants"
FLOOR, AUTOCAST = "floor (bf16 products alone)", "transformers + peft, bf16 autocast"


@dataclass(frozen=True)
class Crowd:
    """What a number of tenants met. ``latencies_s``: of every tenant in every round."""

    num_tenants: int
    tokens_per_s: float
    latencies_s: tuple[float, ...]
    engine_bytes: int
    server_bytes: int

    @property
    def peak_gib(self) -> float:
        return (self.engine_bytes + self.server_bytes) / 2**30


def crowd(base: BaseModel, workload: Training, rounds: int) -> Crowd:
    """``rounds`` after one that warms up."""
    count = len(workload.tenants)
    with running_server(base, count) as server, ThreadPoolExecutor(count) as threads:
        clients = list(threads.map(lambda n: training_client(server, n, base, workload.spec), range(count)))
        data = [sdk_data(of_one) for of_one in workload.tenants]
        _step(clients[0], data[0])
        latencies: list[float] = []
        spans: list[float] = []
        for _ in range(rounds):
            starting = Barrier(count)
            began = time.perf_counter()
            latencies += threads.map(partial(_step, starting=starting), clients, data)
            spans.append(time.perf_counter() - began)
        memory = peak_rss_bytes(server.engine_pid), peak_rss_bytes(server.pid)
    return Crowd(count, workload.num_tokens / statistics.median(spans), tuple(latencies), *memory)


def _step(client: tinker.TrainingClient, data: list[types.Datum], starting: Barrier | None = None) -> float:
    if starting is not None:
        starting.wait()
    began = time.perf_counter()
    backward = client.forward_backward(data, "cross_entropy")
    update = client.optim_step(types.AdamParams())
    backward.result()
    update.result()
    return time.perf_counter() - began


def baseline_rates(base: BaseModel, workload: Training, rounds: int) -> dict[str, float]:
    """tokens/s of one tenant's step."""
    workloads = {"one": workload}
    variants = {
        FLOOR: Variant(partial(baselines.floor, base, workloads), workloads),
        AUTOCAST: Variant(partial(baselines.peft_training, base, workloads, autocast=True), workloads),
    }
    measured = measure(variants, [["one"]], rounds)
    return {name: workload.num_tokens / measured.median(("one", name)) for name in variants}


def crowd_table(crowds: Sequence[Crowd], rates: dict[str, float], num_tokens: int) -> str:
    rows: list[tuple[object, ...]] = [
        (f"{name}, 1 tenant", f"{rate:.0f}", f"{num_tokens / rate:.2f}", "", "", "", "") for name, rate in rates.items()
    ]
    alone = statistics.median(crowds[0].latencies_s)
    for item in crowds:
        p50 = statistics.median(item.latencies_s)
        memory = (f"{size / 2**30:.2f}" for size in (item.engine_bytes, item.server_bytes))
        latency = (f"{p50:.2f}", f"{max(item.latencies_s):.2f}", f"{max(item.latencies_s) / alone:.2f} x")
        rows.append((item.num_tenants, f"{item.tokens_per_s:.0f}", *latency, *memory))
    versus = f"max over p50 of {crowds[0].num_tenants}"
    heads = ("tenants", "tokens/s", "latency p50 s", "max s", versus, "engine peak GiB", "server peak GiB")
    return table(heads, rows)


def judge(crowds: Sequence[Crowd]) -> list[Judged]:
    peaks = {item.num_tenants: item.peak_gib for item in crowds}
    if not {1, 8} <= peaks.keys():
        return []
    return [
        Judged("peak memory, engine and server: 8 tenants over 1", peaks[8] / peaks[1], 1.3, 1.15, is_limit=True),
        Judged("peak memory, engine and server: 8 tenants", peaks[8] * 2**30 / 1e9, 3, 2, unit="GB", is_limit=True),
    ]


def draw(crowds: Sequence[Crowd], rates: dict[str, float], title: str, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    counts = [item.num_tenants for item in crowds]
    figure, (speed, latency, memory) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    speed.plot(counts, [item.tokens_per_s for item in crowds], "o-", label="TuFT, through the SDK")
    for (name, rate), color in zip(rates.items(), ("black", "gray"), strict=True):
        speed.axhline(rate, label=f"{name}, one tenant", color=color, linestyle="--")
    speed.set(title="all tenants together", ylabel="tokens/s", ylim=(0, 1.6 * max(rates.values())))  # room for names
    latency.plot(counts, [max(item.latencies_s) for item in crowds], "o-", label="slowest tenant")
    latency.plot(counts, [statistics.median(item.latencies_s) for item in crowds], "o-", label="median tenant")
    latency.set(title="a tenant's step", ylabel="s", yscale="log")
    memory.stackplot(
        counts,
        [item.engine_bytes / 2**30 for item in crowds],
        [item.server_bytes / 2**30 for item in crowds],
        labels=["engine", "server"],
    )
    memory.set(title="peak memory", ylabel="GiB", ylim=(0, None))
    for axes in (speed, latency, memory):
        axes.set(xscale="log", xlabel="tenants")
        axes.set_xticks(counts, [str(count) for count in counts], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    parser = arguments(MODULE, __doc__, rounds=2)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--small", action="store_true", help="1 x 64 tokens instead of 4 x 256")
    parser.add_argument("--picture", type=Path, default=Path("out/bench/tenants.svg"), help="[%(default)s]")
    options = parser.parse_args()
    base, spec = BaseModel.embedded(), LoraSpec(rank=8, train_unembed=False)
    text = Text.of_chats(base, options.chats)
    size = (1, 64) if options.small else (4, 256)
    one = equal(text, spec, 1, *size)
    rates = baseline_rates(base, one, options.rounds)
    crowds = [crowd(base, equal(text, spec, count, *size), options.rounds) for count in sorted(options.tenants)]
    what = f"{base.name}, LoRA rank {spec.rank}, each tenant {size[0]} x {size[1]} tokens a step"
    draw(crowds, rates, what, options.picture)
    sections = [
        f"{what}, through the real SDK; {options.rounds} rounds after one that warms up. Picture: {options.picture}.",
        crowd_table(crowds, rates, one.num_tokens),
        "" if options.small else judged_table(judge(crowds)),
    ]
    publish(MODULE, "Tenants", sections, options.markdown)


if __name__ == "__main__":
    main()
