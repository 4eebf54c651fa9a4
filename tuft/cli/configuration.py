"""`tuft config`: what `tuft launch` would use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuft.cli.options import ConfigOption, HomeOption, escaped, out
from tuft.config import Config, load_config


def config_command(
    config: ConfigOption = None,
    home: HomeOption = None,
    check: Annotated[bool, typer.Option("--check", help="say whether the configuration can be honoured")] = False,
    show: Annotated[bool, typer.Option("--show", help="print every option with its value and meaning")] = False,
) -> None:
    """Check or show the configuration that `tuft launch` would use."""
    options = load_config(config, home=home)
    if show or not check:
        _show_options(options)
    if check:
        from tuft.app import model_sources

        for source in model_sources(options):
            is_hub_id = not Path(source.path).expanduser().exists()
            where = f"hub id {source.path}, fetched at launch" if is_hub_id else source.path
            out.print(f"[green]●[/] {source.name}: {where}")
        out.print(f"[bold green]ok[/]  {config or 'defaults'}: home {options.home}, "
                  f"http://{options.server.host}:{options.server.port}")  # fmt: skip


def _show_options(options: Config) -> None:
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if hasattr(type(value), "model_fields"):
            out.print(f"[bold]\\[{name}][/]")
            for key, inner in type(value).model_fields.items():
                out.print(f"{key} = {_toml(getattr(value, key))}  [dim]# {escaped(inner.description or '')}[/]")
        else:
            out.print(f"{name} = {_toml(value)}  [dim]# {escaped(field.description or '')}[/]")


def _toml(value: object) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        names = ("name", "tenant", "project_id")
        value = [next((getattr(item, name) for name in names if hasattr(item, name)), item) for item in value]
    return escaped(json.dumps(value, default=str))
