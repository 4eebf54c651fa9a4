"""`tuft usage`: what the ledger says, of one tenant or of all. Works beside a running server, on the same database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, out, print_json, print_table
from tuft.cli.quotas import opened_store
from tuft.errors import InvalidInput
from tuft.metering import COSTS_A_UNIT, GIGABYTE, cost_of
from tuft.records import now

if TYPE_CHECKING:
    from tuft.store.usage import UsageSum

_BY: Mapping[str, Callable[[UsageSum], str]] = {
    "tenant": lambda row: row.tenant_id,
    "key": lambda row: str(row.key_number) if row.key_number else "",
    "day": lambda row: f"{row.day}",
    "model": lambda row: row.base_model,
    "kind": lambda row: row.kind,
}


def usage(
    tenant: Annotated[str | None, typer.Option(help="whose; default: everyone's")] = None,
    by: Annotated[str, typer.Option(help=f"what a row is: some of {', '.join(_BY)}")] = "tenant,kind",
    since: Annotated[str | None, typer.Option(help="first day (UTC), e.g. 2026-01-31; default: of this month")] = None,
    until: Annotated[str | None, typer.Option(help="last day (UTC); default: today")] = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print tokens, checkpoints, storage and their cost, by tenant, key, day, model and kind."""
    parts = [part.strip() for part in by.split(",")]
    for part in parts:
        if part not in _BY:
            raise InvalidInput("by", part, f"must be some of {', '.join(_BY)}")
    first = _day("since", since) if since else now().replace(day=1).date()
    last = _day("until", until) if until else now().date()
    from tuft.service.services import open_tenants
    from tuft.store.catalog import Catalog
    from tuft.store.usage import UsageTable

    with opened_store(config, home) as (options, database):
        tenant_id = None if tenant is None else open_tenants(options, database).named(tenant).tenant_id
        found = UsageTable(database).daily_sums(_midnight(first), tenant_id, _midnight(last + timedelta(days=1)))
        names = Catalog(database).tenant_names({row.tenant_id for row in found})
    rows = _grouped(found, parts, names)
    if as_json:
        print_json({"since": first, "until": last, "currency": options.prices.currency, "rows": rows})
        return
    out.print(f"{first} to {last} (UTC)" + ("" if rows else ": nothing"))
    if rows:
        columns = (*parts, "quantity", options.prices.currency)
        print_table(columns, [[*(str(row[part]) for part in parts), _quantity(row), _cost(row)] for row in rows])


def _grouped(
    found: Sequence[UsageSum], parts: Sequence[str], names: Mapping[str, str]
) -> list[dict[str, str | float | int]]:
    """One row for each value of ``parts``. Tokens, checkpoints and byte seconds are never added to one another."""
    sums: defaultdict[tuple[str, ...], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in found:
        key = tuple(_BY[part](row) for part in parts)
        unit = {"storage": "byte_seconds", "checkpoint": "checkpoints"}.get(row.kind, "tokens")
        sums[key][unit] += row.quantity
        sums[key]["cost"] += cost_of(row.kind, row.quantity, row.rate)
    rows: list[dict[str, str | float | int]] = []
    for key, counted in sorted(sums.items()):
        named: dict[str, str | float | int] = dict(zip(parts, key, strict=True))
        if "tenant" in named:
            named["tenant"] = names[str(named["tenant"])]
        cost = counted.pop("cost", 0) / COSTS_A_UNIT
        rows.append({**named, **counted, "cost": cost})
    return rows


def _quantity(row: Mapping[str, str | float | int]) -> str:
    shown = []
    if "tokens" in row:
        shown.append(f"{row['tokens']:,} tokens")
    if "checkpoints" in row:
        shown.append(f"{row['checkpoints']:,} checkpoints")
    if "byte_seconds" in row:
        shown.append(f"{float(row['byte_seconds']) / GIGABYTE / 3600:,.3f} gigabyte hours")
    return ", ".join(shown)


def _cost(row: Mapping[str, str | float | int]) -> str:
    return f"{float(row['cost']):,.6f}"


def _day(option: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(option, text, "must be a day, e.g. 2026-01-31") from error


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
