"""`tuft quota`: what tenants and keys may have. The server knows within a second."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, print_json, print_table
from tuft.cli.tenants import user_name
from tuft.config import load_config
from tuft.errors import InvalidInput, NotFound
from tuft.metering import QUOTA_NAMES, Holder, QuotaName
from tuft.records import Operator

if TYPE_CHECKING:
    from pathlib import Path

    from tuft.config import Config
    from tuft.store.db import Database

app = typer.Typer(no_args_is_help=True, help="Show and set what tenants and keys may have.")

Value = Annotated[str | None, typer.Option(metavar="N", help="a number, none (no limit), or default")]


@app.command(
    "set",
    epilog="Examples:  tuft quota set --tenant alice --tokens-per-day 1e6 --spend-per-month 50  ·  "
    "tuft quota set --tenant alice --spend-total none",
)
def quota_set(
    tenant: Annotated[str, typer.Option(help="whose quota")],
    key: Annotated[int, typer.Option(help="of one key alone: its number in `tuft key list`")] = 0,
    requests_per_s: Value = None,
    concurrent_runs: Value = None,
    queued_operations: Value = None,
    resident_bytes: Value = None,
    stored_bytes: Value = None,
    tokens_per_day: Value = None,
    spend_per_day: Value = None,
    spend_per_month: Value = None,
    spend_total: Value = None,
    config: ConfigOption = None,
    home: HomeOption = None,
) -> None:
    """Set quotas of a tenant, or of one key of theirs; what is not named stays as it is."""
    given = (requests_per_s, concurrent_runs, queued_operations, resident_bytes, stored_bytes, tokens_per_day)
    texts = dict(zip(QUOTA_NAMES, (*given, spend_per_day, spend_per_month, spend_total), strict=True))
    named = {name: text for name, text in texts.items() if text is not None}
    if not named:
        raise InvalidInput("quota", "nothing", "give at least one, such as --tokens-per-day 1e6")
    values = {name: _value(name, text) for name, text in named.items() if text != "default"}
    from tuft.service.audit import Audit
    from tuft.service.services import open_tenants
    from tuft.store.audit import AuditLog
    from tuft.store.quotas import QuotaTable

    with opened_store(config, home) as (options, database):
        tenants = open_tenants(options, database)
        for section in options.keys:
            tenants.accept(section.tenant, section.key.get_secret_value(), section.scopes)
        owner = tenants.named(tenant)
        if key and tenants.find_key(key).tenant != owner:
            raise NotFound(f"key: {key} is none of tenant {tenant}; `tuft key list` shows all")
        default = tuple(name for name in named if name not in values)
        QuotaTable(database).set(Holder(owner.tenant_id, key), values, default)
        audit = Audit(AuditLog(database), options.limits.audit_retention_days)
        told: dict[str, str | int | None] = {"key_number": key} if key else {}
        told |= {str(name): text for name, text in named.items()}
        audit.note(Operator(user_name()), "tenant_quota_set", owner.tenant_id, **told)


@app.command("list", epilog="Examples:  tuft quota list  ·  tuft quota list --json")
def quota_list(config: ConfigOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the quotas that were set, and those of the configuration, which hold for everyone else."""
    from tuft.service.quotas import configured_quotas
    from tuft.store.catalog import Catalog
    from tuft.store.quotas import QuotaTable

    with opened_store(config, home) as (options, database):
        found = QuotaTable(database).all()
        names = Catalog(database).tenant_names({holder.tenant_id for holder in found})
    rows = [("(everyone)", 0, name, value) for name, value in configured_quotas(options).items()]
    for holder, values in sorted(found.items()):
        rows += [(names[holder.tenant_id], holder.key_number, name, value) for name, value in values.items()]
    if as_json:
        print_json([dict(zip(("tenant", "key", "quota", "allowed"), row, strict=True)) for row in rows])
        return
    shown = [(tenant, str(key) if key else "", name, _text(value)) for tenant, key, name, value in rows]
    print_table(("tenant", "key", "quota", "allowed"), shown)


@contextmanager
def opened_store(config: Path | None, home: Path | None) -> Iterator[tuple[Config, Database]]:
    """The configuration, and the database of its home."""
    from tuft.app import open_store

    options = load_config(config, home=home)
    database = open_store(options)
    try:
        yield options, database
    finally:
        database.close()


def _value(name: QuotaName, text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InvalidInput(name, text, "must be a number from 0 on, none (no limit), or default (the configuration's)")
    return value


def _text(value: float | None) -> str:
    return "no limit" if value is None else f"{value:,.12g}"
