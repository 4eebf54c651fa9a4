"""What the way through the server costs: the same operations by the SDK over HTTP, and by the engine alone.

    python -m bench.server [--rounds 8]

Both have an engine in a process of its own with every default. ``step`` is one tenant's forward_backward of 4 x 256
tokens and optim_step, submitted together; ``smallest`` a forward of 1 x 16 tokens, many times in a round. What the SDK
takes longer is HTTP, both encodings, the queue, the SDK's own work, and the client beside the engine on the same cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tinker import types

from bench.live import running_server, sdk_data, server_home, training_client
from bench.measure import Compute, Figures, Measured, Variant, measure
from bench.report import Judged, arguments, judged_table, publish, table
from bench.workloads import BaseModel, Text, Training, equal
from tuft.app import prepare_home, start_engine
from tuft.config import load_config
from tuft.engine.base import CreateAdapter, OptimStep, RunLoss
from tuft.types import AdamParams, LoraSpec

MODULE = "bench.server"
STEP, SMALLEST = "step", "smallest"
ENGINE, SDK = "engine alone", "server, SDK"
SMALLEST_A_ROUND = 30


def repeated(operation: Callable[[], None], count: int) -> Figures:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds}


def rounds_of(step: Callable[[], None], smallest: Callable[[], None]) -> Compute:
    def compute(case: str, warm_up: bool) -> Figures:
        if case == STEP:
            return repeated(step, 1)
        return repeated(smallest, 3 if warm_up else SMALLEST_A_ROUND)

    return compute


@contextmanager
def engine_alone(base: BaseModel, workload: Training, smallest: Training) -> Iterator[Compute]:
    with server_home(base) as home:
        config = load_config(home / "tuft.toml", home=home)
        prepare_home(config.home)
        engine = start_engine(config)
        try:
            engine.wait_ready()
            engine.submit([CreateAdapter("0", base.name, workload.spec)])[0].result()

            def step() -> None:
                pending = engine.submit([RunLoss("0", workload.data, "cross_entropy")])
                pending += engine.submit([OptimStep("0", AdamParams())])
                for future in pending:
                    future.result()

            def forward() -> None:
                engine.submit([RunLoss("0", smallest.data, "cross_entropy", backward=False)])[0].result()

            yield rounds_of(step, forward)
        finally:
            engine.close()


@contextmanager
def through_sdk(base: BaseModel, workload: Training, smallest: Training) -> Iterator[Compute]:
    with running_server(base, num_tenants=1) as server:
        client = training_client(server, 0, base, workload.spec)
        data, small_data = sdk_data(workload.data), sdk_data(smallest.data)

        def step() -> None:
            backward = client.forward_backward(data, "cross_entropy")
            update = client.optim_step(types.AdamParams())
            backward.result()
            update.result()

        def forward() -> None:
            client.forward(small_data, "cross_entropy").result()

        yield rounds_of(step, forward)


def latency_table(measured: Measured) -> str:
    rows = []
    for case, name in ((STEP, ENGINE), (STEP, SDK), (SMALLEST, ENGINE), (SMALLEST, SDK)):
        key = case, name
        count = len(measured.rounds[key]["seconds"])
        rows.append((case, name, *(f"{1e3 * measured.percentile(key, percent):.1f}" for percent in (50, 95)), count))
    return table(("operation", "through", "p50 ms", "p95 ms", "of"), rows)


def judge(measured: Measured) -> list[Judged]:
    step = measured.ratio((STEP, SDK), (STEP, ENGINE))
    beyond = 1e3 * (measured.median((SMALLEST, SDK)) - measured.median((SMALLEST, ENGINE)))
    return [
        Judged("1 tenant's step: SDK over engine alone", step, 1.10, 1.03, is_limit=True),
        Judged("smallest operation: SDK beyond the engine", beyond, 15, 5, unit="ms", is_limit=True),
    ]


def main() -> None:
    parser = arguments(MODULE, __doc__, rounds=8)
    options = parser.parse_args()
    base, spec = BaseModel.embedded(), LoraSpec(rank=8, train_unembed=False)
    text = Text.of_chats(base, options.chats)
    workload, smallest = equal(text, spec, 1, 4, 256), equal(text, spec, 1, 1, 16)
    variants = {
        ENGINE: Variant(partial(engine_alone, base, workload, smallest), (STEP, SMALLEST)),
        SDK: Variant(partial(through_sdk, base, workload, smallest), (STEP, SMALLEST)),
    }
    measured = measure(variants, [[STEP], [SMALLEST]], options.rounds)
    sections = [
        f"{base.name}, LoRA rank {spec.rank}; step: {workload.title}; smallest: forward of 1 x 16 tokens. "
        f"{options.rounds} rounds in which engine and server took turns.",
        latency_table(measured),
        judged_table(judge(measured)),
    ]
    publish(MODULE, "Through the server", sections, options.markdown)


if __name__ == "__main__":
    main()
