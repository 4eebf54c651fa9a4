"""`tuft tenant`: who may use the server. Its commands work while the server runs, which knows within a second."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, day, print_json, print_table
from tuft.config import load_config
from tuft.records import Operator

if TYPE_CHECKING:
    from pathlib import Path

    from tuft.service.tenants import Tenants

app = typer.Typer(no_args_is_help=True, help="List, make, suspend and resume tenants.")

NameArgument = Annotated[str, typer.Argument(help="the tenant's name")]
ALL = 1_000_000
"""As many rows as a command prints."""


@contextmanager
def opened_tenants(config: Path | None, home: Path | None) -> Iterator[tuple[Tenants, Operator]]:
    """The tenants of that home, and who is changing them."""
    from tuft.app import open_store
    from tuft.service.services import open_tenants

    options = load_config(config, home=home)
    database = open_store(options)
    try:
        yield open_tenants(options, database), Operator(user_name())
    finally:
        database.close()


@app.command("list", epilog="Examples:  tuft tenant list  ·  tuft tenant list --json")
def tenant_list(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the tenants: since when, how many keys open the door for each, and who is suspended."""
    from tuft.service.tenant_facts import tenant_facts

    with opened_tenants(config, home) as (tenants, _):
        found, _total = tenants.tenants(ALL, 0)
    if as_json:
        print_json([tenant_facts(tenant) for tenant in found])
        return
    rows = [
        (item.tenant.name, str(item.num_keys), day(item.created_at), _state(day(item.suspended_at))) for item in found
    ]
    print_table(("tenant", "keys", "since", "state"), rows)


@app.command("create", epilog="Example:  tuft tenant create alice && tuft key create --tenant alice --name laptop")
def tenant_create(
    name: NameArgument, config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Make a tenant, without a key yet."""
    with opened_tenants(config, home) as (tenants, operator):
        made = tenants.create_tenant(name, by=operator)
    if as_json:
        print_json({"tenant_id": made.tenant_id, "name": made.name})
    else:
        print(made.tenant_id)


@app.command("suspend", epilog="Example:  tuft tenant suspend alice")
def tenant_suspend(name: NameArgument, config: ConfigOption = None, home: HomeOption = None) -> None:
    """Let nobody in with the tenant's keys. What was accepted is computed, what was stored stays."""
    with opened_tenants(config, home) as (tenants, operator):
        tenants.suspend(name, by=operator)


@app.command("resume", epilog="Example:  tuft tenant resume alice")
def tenant_resume(name: NameArgument, config: ConfigOption = None, home: HomeOption = None) -> None:
    """Let the tenant's keys in again."""
    with opened_tenants(config, home) as (tenants, operator):
        tenants.resume(name, by=operator)


def _state(suspended_since: str) -> str:
    return f"suspended since {suspended_since}" if suspended_since else "active"


def user_name() -> str:
    """What the machine calls whoever runs the command; containers know some by no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
