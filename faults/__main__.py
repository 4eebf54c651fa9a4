"""Attack the server in every way that docs/reliability.md lists, and write that score card.

make faults                     # all of it, at full size: about an hour
python -m faults --short        # each a little, as CI does; writes nothing
python -m faults kills soak     # some of it

With --write each record is kept in out/faults, and the card is made of all that this commit has: attacks may be run one
after another, or again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from faults import crash, fairness, load, spend, waits
from faults.client import allow_many_descriptors
from faults.record import Record

ROOT = Path(__file__).parents[1]
CARD = ROOT / "docs" / "reliability.md"
RECORDS = ROOT / "out" / "faults"


@dataclass(frozen=True)
class Attack:
    """``run`` is told how often; ``full`` and ``short`` are that number by hand and in CI. ``is_timed``: its figures
    are times or shares, which a busy machine spoils: in short, only what was lost is judged."""

    name: str
    promise: str
    run: Callable[[int], Record]
    full: int
    short: int
    is_timed: bool = False


def tests(name: str, injected: str, *paths: str) -> Callable[[int], Record]:
    """An attack that is made of tests: so many cases, of which none may fail."""

    def run(_: int) -> Record:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        began_s = time.monotonic()
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        summary = told.stdout.strip().splitlines()[-1] if told.stdout.strip() else "no output"
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)}
        num_bad = sum(number for word, number in counts.items() if word not in ("passed", "skipped"))
        broken = () if told.returncode == 0 else (summary,)
        measured = {"skipped": float(counts.get("skipped", 0)), "elapsed_s": round(time.monotonic() - began_s, 1)}
        return Record(name, injected, counts.get("passed", 0) + num_bad, num_bad, measured, broken)

    return run


ATTACKS = (
    Attack("kills", "what was acknowledged is never lost", crash.kills, 200, 6),
    Attack(
        "duplicates",
        "a retry executes once, also across a restart",
        tests("duplicates and restarts", "case", "tests/e2e/test_durability.py", "tests/service/test_recovery.py"),
        1,
        0,
    ),
    Attack(
        "saves",
        "no listed checkpoint fails to verify",
        tests("interrupted saves", "case", "tests/service/test_interrupted_saves.py", "tests/store/test_weights.py"),
        1,
        0,
    ),
    Attack(
        "disk",
        "disk full, EIO, bit flips, truncated files: clear errors, and nothing else is lost",
        tests(
            "disk and database",
            "case",
            "tests/e2e/test_disk.py",
            "tests/store/test_faults.py",
            "tests/store/test_integrity.py",
            "tests/store/test_journal_writer.py",
            "tests/service/test_verification.py",
        ),
        1,
        0,
    ),
    Attack(
        "schema",
        "older and newer schemas, and clocks that jump",
        tests("schemas and clocks", "case", "tests/store/test_schema.py", "tests/e2e/test_clock.py"),
        1,
        0,
    ),
    Attack(
        "room",
        "a hundred runs train where ten fit; what kills engines is set aside",
        tests("room for many", "case", "tests/e2e/test_room.py", "tests/service/test_residency.py"),
        1,
        0,
    ),
    Attack(
        "tenants",
        "nobody reaches another's work",
        tests("the tenant grid", "case", "tests/isolation"),
        1,
        0,
    ),
    Attack(
        "alone",
        "a run's numbers are those of a run that is alone",
        tests("alone in the batch", "case", "tests/engine/test_alone.py"),
        1,
        0,
    ),
    Attack("crowd", "who sends one a second is served beside a crowd", fairness.crowd, 10_000, 300, is_timed=True),
    Attack("shares", "Jain index 0.95 for equal weights, 1:3 for 1:3", fairness.shares, 1000, 200, is_timed=True),
    Attack(
        "waits",
        "ETA within 25 % for 9 of 10 waits of a steady mix",
        waits.steady,
        500,
        60,
        is_timed=True,
    ),
    Attack("spend", "at most one operation over the cap", spend.races, 1000, 100),
    Attack("waiting", "futures waiting at once, and healthz below 100 ms", load.waiting, 10_000, 500, is_timed=True),
    Attack("slow", "slow sockets hold nobody", load.slow_sockets, 500, 60, is_timed=True),
    Attack("reconnects", "all come back after a restart, and are served", load.reconnects, 1000, 100, is_timed=True),
    Attack("soak", "memory and descriptors do not grow", load.soak, 10_000, 300, is_timed=True),
)


def keep(attack: Attack, record: Record, command: str) -> None:
    """For the card, also of later commands."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    kept = {"commit": _commit(), "command": command, "record": asdict(record)}
    (RECORDS / f"{attack.name}.json").write_text(json.dumps(kept))


def kept() -> dict[str, tuple[str, Record]]:
    """By attack, of this commit: the command that gave it, and the record."""
    found = {}
    for file in RECORDS.glob("*.json"):
        told = json.loads(file.read_text())
        if told["commit"] == _commit():
            found[file.stem] = told["command"], Record(**told["record"])
    return found


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def card() -> str:
    """The score card as Markdown, of all that is kept of this commit."""
    found = kept()
    records = [(attack, *found[attack.name]) for attack in ATTACKS if attack.name in found]
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(command for _, command, _ in records))
    lines = [
        "# Reliability: the score card",
        "",
        "What was injected, how often, and what was lost of what had been promised. Written by `make faults`.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {_commit()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; {commands}",
        "",
        "| promise | injected | times | lost | verdict |",
        "|---|---|---|---|---|",
    ]
    for attack, _, record in records:
        verdict = "holds" if record.holds else "**broken**"
        lines.append(f"| {attack.promise} | {record.injected} | {record.times:,} | {record.lost} | {verdict} |")
    missing = [attack.name for attack in ATTACKS if attack.name not in found]
    if missing:
        lines += ["", f"Not part of this card, which is not the whole list: {', '.join(missing)}."]
    lines += ["", "## Figures", ""]
    for attack, _, record in records:
        lines += [f"**{record.name}** (`python -m faults {attack.name}`)", ""]
        lines += [f"- {name}: {value:g}" for name, value in record.measured.items()]
        lines += [f"- **broken: {what}**" for what in record.broken] + [""]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [attack.name for attack in ATTACKS]
    parser.add_argument("attacks", nargs="*", choices=[[], *names], help="default: all")
    parser.add_argument("--short", action="store_true", help="each a little, and what the test suite runs is left out")
    parser.add_argument("--scale", type=float, default=1.0, help="this part of the full size, e.g. 0.1")
    parser.add_argument("--write", action="store_true", help=f"write {CARD.relative_to(ROOT)}")
    chosen = parser.parse_args(arguments)
    allow_many_descriptors()
    records = []
    for attack in ATTACKS:
        times = attack.short if chosen.short else max(1, round(attack.full * chosen.scale))
        if times and (not chosen.attacks or attack.name in chosen.attacks):
            print(f"--- {attack.name}: {attack.promise}", flush=True)
            records.append((attack, attack.run(times)))
            print(records[-1][1], flush=True)
            if chosen.write:  # after each: an hour's work is not lost with its last minute
                keep(attack, records[-1][1], " ".join(["python -m faults", *(arguments or sys.argv[1:])]))
                CARD.write_text(card())
    if chosen.short:
        return int(any(record.lost or (record.broken and not attack.is_timed) for attack, record in records))
    return int(not all(record.holds for _, record in records))


if __name__ == "__main__":
    sys.exit(main())
