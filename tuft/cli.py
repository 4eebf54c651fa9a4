"""The ``tuft`` command. Imports nothing heavy until a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tuft import __version__
from tuft.config import Config, load_config
from tuft.errors import TuftError
from tuft.types import BaseModelInfo

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="TuFT: fine-tune LoRA adapters of one shared base model for many tenants, through the Tinker service API.",
)
key_app = typer.Typer(no_args_is_help=True, help="Make API keys.")
app.add_typer(key_app, name="key")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file of options, e.g. tuft.toml", envvar="TUFT_CONFIG")
]
HomeOption = Annotated[
    Path | None, typer.Option("--home", help="directory of all state  [default: ~/.tuft, or TUFT_HOME]")
]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: errors raised on purpose become one message and exit code 1."""
    try:
        app()
    except TuftError as error:
        err.print(f"[bold red]error:[/] {_escaped(str(error))}")
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"tuft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:  tuft launch  ·  tuft launch --port 0 --home /tmp/try  ·  tuft launch --config tuft.toml"
)
def launch(
    config: ConfigOption = None,
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="address to listen on  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port; 0 takes a free one  [default: 10610]")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log every operation that fails")] = False,
) -> None:
    """Start the server. Without options: the embedded model, state under ~/.tuft, http://localhost:10610."""
    options = load_config(config, home=home, **{"server.host": host, "server.port": port})
    _log_to_stderr(logging.INFO if verbose else logging.WARNING)
    from tuft.app import serve

    serve(options, _Terminal(options))
    out.print("stopped")


@key_app.command("create", epilog="Example:  tuft key create --tenant alice")
def key_create(
    tenant: Annotated[str, typer.Option(help="whose key it is; a new name makes a new tenant")],
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Print a new API key for a tenant. Works while the server runs; only the key's hash is kept."""
    from tuft.app import open_store
    from tuft.service.services import open_tenants

    options = load_config(config, home=home)
    database = open_store(options)
    try:
        print(open_tenants(options, database).create_key(tenant))  # bare, so that KEY=$(tuft key create ...) works
    finally:
        database.close()


@app.command("config", epilog="Examples:  tuft config --check --config tuft.toml  ·  tuft config --show")
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
                out.print(f"{key} = {_toml(getattr(value, key))}  [dim]# {_escaped(inner.description or '')}[/]")
        else:
            out.print(f"{name} = {_toml(value)}  [dim]# {_escaped(field.description or '')}[/]")


def _toml(value: object) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        names = ("name", "tenant", "project_id")
        value = [next((getattr(item, name) for name in names if hasattr(item, name)), item) for item in value]
    return _escaped(json.dumps(value, default=str))


class _Terminal:
    """Tells the person who launched the server how it is doing, and how to connect."""

    def __init__(self, options: Config) -> None:
        self._options = options
        self._started_s = time.monotonic()

    def listening(self, url: str, key: str | None, key_is_new: bool) -> None:
        out.print(f"TuFT {__version__}")
        out.print(f"  base URL  [bold]{url}[/]")
        if self._options.api_key is not None:
            key = None
            out.print("  API key   the one in TUFT_API_KEY")
        elif key is None:
            out.print("  API key   [dim]`tuft key create --tenant NAME` prints one[/]")
        else:
            origin = f"{'made now, kept' if key_is_new else 'kept'} in {self._options.home / 'api_key'}"
            out.print(f"  API key   [bold]{_escaped(key)}[/]  [dim]({_escaped(origin)})[/]")
        out.print("  try it in Python:\n")
        print(
            "import tinker\n"
            f'client = tinker.ServiceClient(base_url="{url}", api_key="{key or "tml-..."}")\n'
            "print(client.get_server_capabilities().supported_models)\n"
        )
        out.print("[dim]loading the base model ...[/]")

    def ready(self, models: Sequence[BaseModelInfo]) -> None:
        for model in models:
            facts = f"{model.num_parameters / 1e6:,.0f} M parameters, {model.precision}"
            out.print(f"[green]●[/] {model.name}  [dim]{facts}, context {model.max_context_tokens} tokens[/]")
            for need in model.memory_plan:
                out.print(f"  [dim]{need.num_bytes / 1e6:7,.0f} MB  {need.purpose}[/]")
        out.print(f"[bold green]ready[/] after {time.monotonic() - self._started_s:.1f} s; Ctrl-C stops the server")

    def stopping(self) -> None:
        out.print("stopping: queued work ends first ...")


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _log_to_stderr(level: int) -> None:
    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
