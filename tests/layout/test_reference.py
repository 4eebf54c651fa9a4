"""What the public may rely on, listed in docs/reference.md: options, commands, routes, errors.

A change to any of them shows here. If it is meant: ``python -m tests.layout.test_reference`` writes the page anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from pydantic import BaseModel

from tuft import errors
from tuft.api.http import create_app, status_of
from tuft.cli import app as command_line
from tuft.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_reference_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.layout.test_reference` if the change is meant"


def page() -> str:
    return "\n".join(
        [
            "# Reference",
            "",
            "Written by `python -m tests.layout.test_reference`; a test compares it with the code.",
            "",
            "## Configuration",
            "",
            "Options of `tuft.toml`; `TUFT_<SECTION>__<OPTION>` in the environment overrides the file, and options",
            "of the command line override both.",
            "",
            "| option | default | meaning |",
            "|---|---|---|",
            *(f"| `{name}` | `{default}` | {meaning} |" for name, default, meaning in options(Config)),
            "",
            "## Command line",
            "",
            "| command | options | what it does |",
            "|---|---|---|",
            *commands(typer.main.get_command(command_line), "tuft"),
            "",
            "## Routes",
            "",
            "| method | path |",
            "|---|---|",
            *sorted(f"| {method} | `{path}` |" for path, method in routes()),
            "",
            "## Errors",
            "",
            "| error | category | status | when |",
            "|---|---|---|---|",
            *(f"| {name} | {kind.category} | {status_of(kind())} | {when} |" for name, kind, when in error_kinds()),
            "",
        ]
    )


def options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        item = next((kind for kind in getattr(field.annotation, "__args__", ()) if _is_section(kind)), None)
        if isinstance(default, BaseModel):
            yield from options(type(default), f"{prefix}{name}.")
        elif item is not None:
            yield from options(item, f"{prefix}{name}[].")
        else:
            shown = "required" if field.is_required() else json.dumps(default, default=str)
            yield f"{prefix}{name}", shown, field.description or ""


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def commands(command: Any, name: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for child_name, child in sorted(command.commands.items()):
            yield from commands(child, f"{name} {child_name}")
        return
    flags = ", ".join(f"`{parameter.opts[0]}`" for parameter in command.params if parameter.name != "help")
    yield f"| `{name}` | {flags} | {(command.help or '').splitlines()[0]} |"


def routes() -> Iterator[tuple[str, str]]:
    """Of an application that serves nobody: its routes are known without a service."""
    paths = create_app(SimpleNamespace(config=Config())).openapi()["paths"]  # type: ignore[arg-type]
    for path, methods in paths.items():
        for method in methods:
            yield path, method.upper()


def error_kinds() -> Iterator[tuple[str, Any, str]]:
    """Name, class and meaning, from the tree at the head of errors.py."""
    lines = (errors.__doc__ or "").splitlines()
    for line in lines:
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split(maxsplit=1)
        kind = getattr(errors, words[0], None) if len(words) == 2 else None
        if isinstance(kind, type):
            yield words[0], _Bare(kind), words[1].strip()


class _Bare:
    """An error class that can be made without the arguments of its constructor."""

    def __init__(self, kind: type[errors.TuftError]) -> None:
        self.kind, self.category = kind, kind.category

    def __call__(self) -> errors.TuftError:
        return self.kind.__new__(self.kind)


if __name__ == "__main__":
    PAGE.write_text(page())
