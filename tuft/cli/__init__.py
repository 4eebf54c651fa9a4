"""The ``tuft`` command, one module a noun. Commands import what is heavy themselves, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tuft import __version__
from tuft.cli import checkpoints, configuration, estimate, keys, launch, quotas, status, tenants, usage
from tuft.cli.options import err, escaped, out
from tuft.errors import TuftError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="TuFT: fine-tune LoRA adapters of one shared base model for many tenants, through the Tinker service API.",
)
app.command(
    "launch",
    epilog="Examples:  tuft launch  ·  tuft launch --port 0 --home /tmp/try  ·  tuft launch --config tuft.toml",
)(launch.launch)
app.command("status", epilog="Examples:  tuft status  ·  tuft status --url http://gpu-box:10610 --key tml-... --json")(
    status.status
)
app.add_typer(tenants.app, name="tenant")
app.add_typer(keys.app, name="key")
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(quotas.app, name="quota")
app.command(
    "usage", epilog="Examples:  tuft usage  ·  tuft usage --tenant alice --by day,kind  ·  tuft usage --by key --json"
)(usage.usage)
app.command(
    "estimate",
    epilog="Examples:  tuft estimate chats.jsonl --epochs 3  ·  tuft estimate chats.jsonl --calibrate --json",
)(estimate.estimate)
app.command("config", epilog="Examples:  tuft config --check --config tuft.toml  ·  tuft config --show")(
    configuration.config_command
)


def main() -> None:
    """Entry point: errors raised on purpose become one message and exit code 1."""
    try:
        app()
    except TuftError as error:
        err.print(f"[bold red]error:[/] {escaped(str(error))}")
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
