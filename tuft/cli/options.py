"""What the commands share: options, the consoles, and how text is shown on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file of options, e.g. tuft.toml", envvar="TUFT_CONFIG")
]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="directory of all state  [default: ~/.tuft, or TUFT_HOME]")
]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def escaped(text: str) -> str:
    """``text`` with its brackets shown, not read as markup."""
    return text.replace("[", "\\[")
