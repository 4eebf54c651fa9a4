"""One tenant trains while another samples: what each does to the other, in the engine itself.

    python -m bench.mixed [--seconds 8] [--rounds 3]

The engine's own executor runs in a thread, as it does in the engine's process, and is asked as the service asks it.
The sampling tenant keeps 8 sequences of 64 tokens going; the time between two tokens of a sequence is the time between
the ends of two sampler steps. The training tenant repeats steps of 4 x 256 tokens (one micro-batch, then AdamW). Each
alone, then both at once, in turns within one process. The largest gap is shown because a percentile can hide it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

from bench import baselines, ours
from bench.measure import ENGINE_ENVIRONMENT, Compute, Figures, Measured, Variant, measure
from bench.report import Judged, arguments, judged_table, publish, table
from bench.workloads import BaseModel, Sampling, Text, Training, equal
from tuft.engine.adapters import Adapters
from tuft.engine.base import Command, CreateAdapter, OptimStep, RunLoss
from tuft.engine.executor import Executor
from tuft.engine.loaded import LoadedModel
from tuft.engine.mailbox import Batch, Reply
from tuft.errors import TuftError
from tuft.types import AdamParams, LoraSpec

MODULE = "bench.mixed"
TUFT, FLOOR = "TuFT bf16", "floor (bf16 products alone)"
SAMPLING, TRAINING, BOTH = "sampling alone", "training alone", "both"
CASES = (SAMPLING, TRAINING, BOTH)


class InThread:
    """The executor in a thread of this process; ``submit`` as ``engine.base.Engine`` has it."""

    def __init__(self, model: LoadedModel) -> None:
        self._inbox: SimpleQueue[Batch] = SimpleQueue()
        self._futures: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        executor = Executor(Adapters([model]), self._inbox, self._settle, ours.SETTINGS.micro_batch_tokens)
        threading.Thread(target=executor.run, name="executor", daemon=True).start()

    def submit(self, commands: Sequence[Command]) -> list[Future[Any]]:
        numbered = tuple((next(self._numbers), command) for command in commands)
        futures: list[Future[Any]] = [Future() for _ in numbered]
        self._futures.update(zip((number for number, _ in numbered), futures, strict=True))
        self._inbox.put(Batch(numbered))
        return futures

    def _settle(self, reply: Reply) -> None:
        future = self._futures.pop(reply.number)
        if isinstance(reply.result, TuftError):
            future.set_exception(reply.result)
        else:
            future.set_result(reply.result)


def results(futures: Sequence[Future[Any]]) -> list[Any]:
    return [future.result() for future in futures]


def sample_until(
    engine: InThread, workload: Sampling, text: Text, base: BaseModel, stamps: list[float], until: float
) -> Figures:
    """Requests one after another until then. ``gap``: seconds between tokens, prompts left out."""
    figures: Figures = {"gap": [], "sampled": [], "sampling_span": []}
    began = time.perf_counter()
    num_tokens = 0
    while not figures["gap"] or time.perf_counter() < until:
        stamps.clear()
        for result in results(engine.submit(ours.samples_of(workload, text, base, workload.num_new))):
            num_tokens += sum(len(sequence.tokens_N) for sequence in result.sequences)
        last = stamps[-workload.num_new :]  # earlier steps had no token of every sequence: they computed prompts
        figures["gap"] += [after - before for before, after in itertools.pairwise(last)]
    figures["sampled"].append(float(num_tokens))
    figures["sampling_span"].append(time.perf_counter() - began)
    return figures


def train_while(engine: InThread, workload: Training, wanted: Callable[[], bool]) -> Figures:
    """Steps one after another as long as they are wanted, and one at least. ``pass``: seconds of a forward_backward."""
    figures: Figures = {"pass": [], "trained": [], "training_span": []}
    began = time.perf_counter()
    while not figures["pass"] or wanted():
        pass_began = time.perf_counter()
        backward = engine.submit([RunLoss("trained", workload.data, "cross_entropy")])
        update = engine.submit([OptimStep("trained", AdamParams())])
        results(backward)
        figures["pass"].append(time.perf_counter() - pass_began)
        results(update)
    figures["trained"].append(float(workload.num_tokens * len(figures["pass"])))
    figures["training_span"].append(time.perf_counter() - began)
    return figures


@contextmanager
def tuft(base: BaseModel, workload: Training, sampling: Sampling, text: Text, seconds: float) -> Iterator[Compute]:
    model = ours.load(base, "bf16")
    stamps: list[float] = []
    model.sampler.step = _stamped(model.sampler.step, stamps)  # type: ignore[method-assign]
    engine = InThread(model)
    results(engine.submit([CreateAdapter("trained", base.name, workload.spec)]))

    def compute(case: str, warm_up: bool) -> Figures:
        until = time.perf_counter() + (0 if warm_up else seconds)
        if case == TRAINING:
            return train_while(engine, workload, lambda: time.perf_counter() < until)
        if case == SAMPLING:
            return sample_until(engine, sampling, text, base, stamps, until)
        with ThreadPoolExecutor(1) as threads:
            sampled = threads.submit(sample_until, engine, sampling, text, base, stamps, until)
            trained = train_while(engine, workload, lambda: not sampled.done())
            return {**sampled.result(), **trained}

    yield compute


def _stamped(step: Callable[[], list[Any]], stamps: list[float]) -> Callable[[], list[Any]]:
    def stamped() -> list[Any]:
        outcomes = step()
        stamps.append(time.perf_counter())
        return outcomes

    return stamped


def rate(measured: Measured, case: str, what: str, span: str) -> float:
    figures = measured.rounds[case, TUFT]
    return sum(figures[what]) / sum(figures[span])


def mixed_table(measured: Measured) -> str:
    rows = []
    for case in CASES:
        key = case, TUFT
        gaps, passes = [""] * 4, [""] * 3
        if case != TRAINING:
            gaps = [f"{1e3 * measured.percentile(key, percent, 'gap'):.1f}" for percent in (50, 95, 100)]
            gaps.append(f"{rate(measured, case, 'sampled', 'sampling_span'):.0f}")
        if case != SAMPLING:
            passes = [f"{measured.percentile(key, percent, 'pass'):.2f}" for percent in (50, 95)]
            passes.append(f"{rate(measured, case, 'trained', 'training_span'):.0f}")
        rows.append((case, *gaps, *passes))
    gaps = ["between tokens p50 ms", "p95 ms", "max ms", "sampled tokens/s"]
    return table(("", *gaps, "forward_backward p50 s", "p95 s", "trained tokens/s"), rows)


def judge(measured: Measured) -> tuple[list[Judged], str]:
    idle, one_pass = measured.median((SAMPLING, TUFT), "gap"), measured.median((TRAINING, TUFT), "pass")
    judged = []
    for percent, name in ((95, "p95"), (100, "longest")):
        ratio = measured.percentile((BOTH, TUFT), percent, "gap") / (idle + one_pass)
        what = f"time between tokens while training, {name}, over idle p50 + one micro-batch"
        judged.append(Judged(what, ratio, 1.5, 1.1, is_limit=True))
    return judged, f"One micro-batch takes {one_pass:.2f} s, a token alone {1e3 * idle:.1f} ms (p50)."


def main() -> None:
    parser = arguments(MODULE, __doc__, rounds=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measured turn [%(default)s]")
    options = parser.parse_args()
    base, spec = BaseModel.embedded(), LoraSpec(rank=8, train_unembed=False)
    text = Text.of_chats(base, options.chats)
    workload, sampling = equal(text, spec, 1, 4, 256), Sampling(8)
    variants = {
        TUFT: Variant(partial(tuft, base, workload, sampling, text, options.seconds), CASES, ENGINE_ENVIRONMENT),
        FLOOR: Variant(partial(baselines.floor, base, {TRAINING: workload}), [TRAINING]),
    }
    measured = measure(variants, [CASES], options.rounds)
    judged, told = judge(measured)
    floor = workload.num_tokens / measured.median((TRAINING, FLOOR))
    sections = [
        f"{base.name}, LoRA rank {spec.rank}; training: {workload.title}; sampling: 8 requests of 64 + 64 tokens. "
        f"{options.rounds} rounds of {options.seconds:g} s. Floor of training in the same run: {floor:.0f} tokens/s.",
        mixed_table(measured),
        told,
        judged_table(judged),
    ]
    publish(MODULE, "Training and sampling together", sections, options.markdown)


if __name__ == "__main__":
    main()
