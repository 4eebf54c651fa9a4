"""`tuft key`: API keys. Its commands work while the server runs, which knows within a second."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, day, print_json, print_table
from tuft.cli.tenants import ALL, opened_tenants
from tuft.config import ALL_SCOPES, USER_SCOPES, Scope, load_config

if TYPE_CHECKING:
    from tuft.service.tenants import Tenants

app = typer.Typer(no_args_is_help=True, help="Make, list, revoke and rotate API keys.")

KeyArgument = Annotated[int, typer.Argument(metavar="KEY_ID", help="its number in `tuft key list`")]


@app.command(
    "create",
    epilog="Examples:  tuft key create --tenant alice  ·  "
    "tuft key create --tenant alice --name eval --scope sample --scope read --expires-days 30",
)
def key_create(
    tenant: Annotated[str, typer.Option(help="whose key it is; a new name makes a new tenant")],
    name: Annotated[str, typer.Option(help="what to call it")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"one of {', '.join(ALL_SCOPES)}; again for more; default: {', '.join(USER_SCOPES)}"),
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="days until it expires; default: never")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a new API key for a tenant. Works while the server runs; only the key's hash is kept."""
    lifetime_s = None if expires_days is None else timedelta(days=1).total_seconds() * expires_days
    scopes = tuple(cast("Scope", item) for item in scope) if scope else USER_SCOPES  # the service checks them
    with opened_tenants(config, home) as (tenants, operator):
        _print_made(tenants, tenants.create_key(tenant, name, scopes, lifetime_s, by=operator), as_json)


@app.command("list", epilog="Examples:  tuft key list  ·  tuft key list --tenant alice --json")
def key_list(
    tenant: Annotated[str | None, typer.Option(help="whose keys; default: everyone's")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the API keys, those that ended too; not those that the configuration gives."""
    from tuft.service.tenant_facts import key_facts

    with opened_tenants(config, home) as (tenants, _):
        keys, _total = tenants.keys(tenant, ALL, 0)
    if as_json:
        print_json([key_facts(key) for key in keys])
        return
    rows = [
        (
            str(key.number),
            key.tenant.name,
            key.name,
            f"…{key.hint}",
            " ".join(key.scopes),
            str(key_facts(key)["state"]),
            day(key.expires_at),
            day(key.last_used_at),
        )
        for key in keys
    ]
    print_table(("key id", "tenant", "name", "ends in", "scopes", "state", "expires", "last used"), rows)


@app.command("revoke", epilog="Example:  tuft key revoke 123456789012345")
def key_revoke(number: KeyArgument, config: ConfigOption = None, home: HomeOption = None) -> None:
    """End a key, and every token made from it, at once."""
    with opened_tenants(config, home) as (tenants, operator):
        tenants.revoke(tenants.find_key(number), by=operator)


@app.command("rotate", epilog="Example:  tuft key rotate 123456789012345 --grace-hours 1")
def key_rotate(
    number: KeyArgument,
    grace_hours: Annotated[float, typer.Option(help="how long the old key is good beside the new one")] = 24.0,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a new key in the place of an old one: same tenant, name, scopes and length of life."""
    from tuft.app import keep_rotated

    grace_s = timedelta(hours=1).total_seconds() * grace_hours
    with opened_tenants(config, home) as (tenants, operator):
        old = tenants.find_key(number)
        key = tenants.rotate(old, grace_s, by=operator)
        keep_rotated(load_config(config, home=home), old, key)
        _print_made(tenants, key, as_json)


def _print_made(tenants: Tenants, key: str, as_json: bool) -> None:
    if as_json:
        from tuft.service.tenant_facts import key_facts

        print_json({"key": key, **key_facts(tenants.stored(key))})
    else:
        print(key)  # bare, so that KEY=$(tuft key create ...) works
