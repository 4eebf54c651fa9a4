"""`tuft key`: API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from tuft.cli.options import ConfigOption, HomeOption
from tuft.config import load_config

app = typer.Typer(no_args_is_help=True, help="Make API keys.")


@app.command("create", epilog="Example:  tuft key create --tenant alice")
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
