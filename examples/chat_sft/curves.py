"""What a run leaves behind to look at: metrics.jsonl, curves.png, and a table over several runs.

python examples/chat_sft/curves.py out/sweep/*        compare runs: a table, and out/sweep/comparison.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a file is wanted, and no window or notebook back end is touched
from rich.console import Console
from rich.table import Table

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step. `train_nll` is that of the step's batch before its update; step 0 has none. `test_nll` is
    that of the held-out set after the update, on the steps that measured it. NLL: nats per assistant token."""

    step: int
    train_nll: float | None
    test_nll: float | None
    num_tokens: int
    tokens_per_s: float
    learning_rate: float
    elapsed_s: float


def append_metrics(out_dir: Path, metrics: StepMetrics) -> None:
    with (out_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(metrics)) + "\n")


def read_metrics(out_dir: Path) -> list[StepMetrics]:
    lines = (out_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [StepMetrics(**json.loads(line)) for line in lines]


def plot_curves(history: Sequence[StepMetrics], path: Path, title: str) -> None:
    """Train NLL of every step, its running mean, and test NLL, over optimizer steps."""
    train = [(row.step, row.train_nll) for row in history if row.train_nll is not None]
    test = [(row.step, row.test_nll) for row in history if row.test_nll is not None]
    figure, axes = _axes("NLL per assistant token (nats)", title)
    if train:
        steps, nll = [step for step, _ in train], [value for _, value in train]
        axes.plot(steps, nll, color="tab:blue", alpha=0.3, linewidth=1, label="train, each batch")
        axes.plot(steps, _running_mean(nll), color="tab:blue", linewidth=2, label="train, mean of 10 batches")
    if test:
        axes.plot(*zip(*test, strict=True), color="tab:orange", marker="o", linewidth=2, label="test (held out)")
        for (step, value), offset, side in ((test[0], (12, 0), "left"), (test[-1], (0, 10), "right")):
            axes.annotate(f"test {value:.2f}", (step, value), xytext=offset, textcoords="offset points", ha=side)
    axes.margins(y=0.12)
    axes.legend()
    figure.savefig(path, dpi=150)


def compare_runs(out_dirs: Sequence[Path], console: Console) -> None:
    """A table of the runs, best first, and their test curves in one picture beside them."""
    runs = sorted(((_test_curve(directory), directory) for directory in out_dirs), key=lambda run: run[0][-1][1])
    table = Table("run", "steps", "test NLL at step 0", "at the end", "change", "tokens/s")
    figure, axes = _axes("test NLL per assistant token (nats)", "Held-out NLL of the runs")
    for curve, directory in runs:
        first, last = curve[0][1], curve[-1][1]
        history = read_metrics(directory)
        speed = sum(row.num_tokens for row in history) / history[-1].elapsed_s
        table.add_row(directory.name, str(history[-1].step), f"{first:.3f}", f"{last:.3f}",
                      f"{100 * (last / first - 1):+.1f} %", f"{speed:.0f}")  # fmt: skip
        axes.plot(*zip(*curve, strict=True), marker="o", label=directory.name)
    axes.legend()
    picture = out_dirs[0].parent / "comparison.png"
    figure.savefig(picture, dpi=150)
    console.print(table, f"Curves: {picture}")


def _axes(ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _test_curve(out_dir: Path) -> list[tuple[int, float]]:
    return [(row.step, row.test_nll) for row in read_metrics(out_dir) if row.test_nll is not None]


def _running_mean(values: Sequence[float], window: int = 10) -> list[float]:
    windows = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in windows]


if __name__ == "__main__":
    directories = [Path(argument) for argument in sys.argv[1:] if (Path(argument) / METRICS_FILE).is_file()]
    if not directories:
        sys.exit(f"usage: curves.py RUN_DIR...   (directories that hold a {METRICS_FILE})")
    compare_runs(directories, Console())
