"""Variants measured in turn, each in a process of its own, as its users would have it.

A variant computes cases. The cases of a group are warmed up once by every variant that has them; then, round by round,
cases and variants take turns, so that a round's figures stand beside each other and a ratio is of neighbours in time.
No torch here.
"""

from __future__ import annotations

import itertools
import os
import statistics
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Figures = dict[str, list[float]]
"""What one round gave, by name: ``seconds`` and whatever else the variant knows. One value or several."""

Compute = Callable[[str, bool], Figures]
"""``compute(case, warm_up)``. A warm-up may do less, as long as the first measured round finds everything in place."""

ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""What ``tuft.engine.worker`` gives its process."""


SHORT_REPEATS = 5
"""How often a round repeats what takes only milliseconds."""


@dataclass(frozen=True)
class Variant:
    """``build`` is entered in the variant's own process and left when all is measured; it has to be picklable.
    ``environment`` is all that the process sees of OpenMP's settings: a baseline runs with its own defaults."""

    build: Callable[[], AbstractContextManager[Compute]]
    cases: Collection[str]
    environment: Mapping[str, str] = field(default_factory=dict)


Key = tuple[str, str]
"""Case and variant."""


@dataclass(frozen=True)
class Measured:
    """``first`` is what the warm-ups gave, ``rounds`` everything after them."""

    first: Mapping[Key, Figures]
    rounds: Mapping[Key, Figures]

    def has(self, *keys: Key) -> bool:
        return all(key in self.rounds for key in keys)

    def median(self, key: Key, figure: str = "seconds") -> float:
        return statistics.median(self.rounds[key][figure])

    def percentile(self, key: Key, percent: float, figure: str = "seconds") -> float:
        """The smallest value that ``percent`` of all values do not exceed."""
        values = sorted(self.rounds[key][figure])
        return values[max(0, -int(-len(values) * percent // 100) - 1)]

    def ratio(self, over: Key, under: Key, figure: str = "seconds") -> float:
        """Median of the ratios of neighbours."""
        pairs = zip(self.rounds[over][figure], self.rounds[under][figure], strict=True)
        return statistics.median(first / second for first, second in pairs)


def measure(variants: Mapping[str, Variant], groups: Sequence[Sequence[str]], rounds: int) -> Measured:
    """Group by group: the warm-ups, then the rounds. Raises RuntimeError with what a variant raised."""
    first: dict[Key, Figures] = {}
    measured: dict[Key, Figures] = {}
    turns = [[(case, name) for case in group for name in variants if case in variants[name].cases] for group in groups]
    last = {name: keys for keys in turns for _, name in keys}
    with ExitStack() as stack:
        progress = stack.enter_context(_progress())
        task = progress.add_task("", total=sum(map(len, turns)) * (rounds + 1))
        processes: dict[str, Process] = {}
        for keys in turns:
            for number, (case, name) in itertools.product(range(rounds + 1), keys):
                what = f"{case}: {name}: " + (f"round {number}/{rounds}" if number else "warm-up")
                progress.update(task, description=what)
                if name not in processes:
                    processes[name] = stack.enter_context(closing(Process(name, variants[name])))
                kept = (measured if number else first).setdefault((case, name), {})
                for figure, values in processes[name].compute(case, number == 0).items():
                    kept.setdefault(figure, []).extend(values)
                progress.advance(task)
                if not progress.console.is_terminal:
                    progress.console.print(what)
            for name in [name for name in processes if last[name] is keys]:
                processes.pop(name).close()  # its memory is wanted
    return Measured(first, measured)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


class Process:
    """A variant's process."""

    def __init__(self, name: str, variant: Variant) -> None:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(variant.build, theirs), name=name)
        with _environment(variant.environment):
            self._process.start()
        theirs.close()

    def compute(self, case: str, warm_up: bool) -> Figures:
        """Raises RuntimeError with what the variant raised, or how its process ended."""
        name = self._process.name
        try:
            self._ours.send((case, warm_up))
            answer = self._ours.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise RuntimeError(f"{name}: its process ended with exit status {self._process.exitcode}") from error
        if isinstance(answer, str):
            raise RuntimeError(f"{name}: {case}:\n{answer}")
        figures: Figures = answer
        return figures

    def close(self) -> None:
        """Let the variant leave its block, and wait for the end."""
        self._ours.close()
        self._process.join()


def _serve(build: Callable[[], AbstractContextManager[Compute]], connection: Connection) -> None:
    with build() as compute:
        while True:
            try:
                case, warm_up = connection.recv()
            except EOFError:
                return
            try:
                answer: Figures | str = compute(case, warm_up)
            except Exception:  # noqa: BLE001 - the parent is told, whatever it was
                answer = traceback.format_exc()
            connection.send(answer)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """OpenMP reads its settings when a process starts: ``wanted`` and no others."""
    kept = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(("GOMP_", "OMP_", "KMP_"))}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
        os.environ.update(kept)
