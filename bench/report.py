"""What a benchmark prints: where and how it was measured, its tables, and what is judged against what was promised."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "peft", "tinker")
LOAD_BEFORE = os.getloadavg()[0]


@dataclass(frozen=True)
class Judged:
    """One promise: ``must`` has to be reached, ``aim`` is what we want. ``is_limit``: less is better."""

    what: str
    figure: float
    must: float
    aim: float
    unit: str = "x"
    is_limit: bool = False

    @property
    def verdict(self) -> str:
        def reaches(bound: float) -> bool:
            return self.figure <= bound if self.is_limit else self.figure >= bound

        return "aim" if reaches(self.aim) else "met" if reaches(self.must) else "**not met**"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def judged_table(judged: Iterable[Judged]) -> str:
    rows = []
    for item in judged:
        bounds = (f"{'≤' if item.is_limit else '≥'} {bound:g}" for bound in (item.must, item.aim))
        rows.append((item.what, f"{item.figure:.2f} {item.unit}", *bounds, item.verdict))
    return table(("judged", "figure", "must", "aim", "verdict"), rows) if rows else ""


def arguments(module: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured turns of every variant [{rounds}]")
    parser.add_argument(
        "--chats", type=existing_file, help="JSON Lines of `messages` whose text is used [the packaged chats]"
    )
    parser.add_argument("--markdown", type=existing_file, help="also put the report into this file, above older ones")
    return parser


def existing_file(text: str) -> Path:
    file = Path(text)
    if not file.is_file():
        raise argparse.ArgumentTypeError(f"got {text!r}; must be a file that exists")
    return file


def publish(module: str, title: str, sections: Iterable[str], markdown: Path | None) -> None:
    """Print the report; with ``markdown`` also put it there, above older ones."""
    head = f"## {title}, {datetime.now(UTC):%Y-%m-%d}\n\n{conditions(module)}"
    report = "\n\n".join([head, *filter(None, sections)]) + "\n"
    print(report)
    if markdown is not None:
        head, heading, older = markdown.read_text(encoding="utf-8").partition("\n## ")
        markdown.write_text(f"{head}\n{report}{heading}{older}", encoding="utf-8")


def conditions(module: str) -> str:
    """Machine, versions, commit and command, in one line."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return (
        f"{_cpu()}, {os.cpu_count()} CPUs, load average before {LOAD_BEFORE:.1f}; {versions}; "
        f"commit {commit.stdout.strip()}; `{command}`:"
    )


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
