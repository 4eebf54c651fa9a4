"""What the commands share: options, the consoles, and how text is shown on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file of options, e.g. tuft.toml", envvar="TUFT_CONFIG")
]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="directory of all state  [default: ~/.tuft, or TUFT_HOME]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]

out = Console(highlight=False, soft_wrap=True, emoji=False)  # a run id has ":train:" in it
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

_WIDEST = 10_000


def escaped(text: str) -> str:
    """``text`` with its brackets shown, not read as markup."""
    return text.replace("[", "\\[")


def print_json(content: object) -> None:
    """Moments as ISO 8601."""
    print(json.dumps(content, indent=2, ensure_ascii=False, default=_iso))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A row a line, however wide."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(escaped(cell) for cell in row))
    Console(width=_WIDEST, highlight=False, emoji=False).print(table)


def day(moment: datetime | None) -> str:
    """A moment as tables show it; empty if there is none."""
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


def _iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
