"""`tuft checkpoint`: what is saved, and whether it is whole. Its commands work while the server runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuft.cli.options import ConfigOption, HomeOption, JsonOption, day, err, out, print_json, print_table
from tuft.config import load_config

if TYPE_CHECKING:
    from pathlib import Path

    from tuft.records import Checkpoint
    from tuft.service.inspection import Inspection
    from tuft.store.weights import Orphan

app = typer.Typer(no_args_is_help=True, help="List checkpoints, and verify that they are whole.")

TenantOption = Annotated[str | None, typer.Option("--tenant", help="whose; default: everyone's")]
_PROGRESS_BYTES = 2**26
"""Less is read before anyone could look at a progress bar."""


@app.command("list", epilog="Examples:  tuft checkpoint list --tenant alice  ·  tuft checkpoint list --damaged --json")
def checkpoint_list(
    tenant: TenantOption = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="only those that were found damaged")] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List checkpoints, those that were found damaged too."""
    with _opened(config, home) as inspection:
        found = inspection.checkpoints(tenant)
    shown = [checkpoint for checkpoint in found if not damaged or checkpoint.damage is not None]
    if as_json:
        print_json([_facts(checkpoint) for checkpoint in shown])
        return
    rows = [
        (str(item.path), item.tenant_id, f"{item.size_bytes:,}", day(item.created_at), item.damage or "")
        for item in shown
    ]
    print_table(("checkpoint", "tenant", "bytes", "saved", "damage"), rows)


@app.command(
    "verify",
    epilog="Examples:  tuft checkpoint verify  ·  tuft checkpoint verify tinker://RUN/weights/NAME  ·  "
    "tuft checkpoint verify --delete-orphans",
)
def checkpoint_verify(
    paths: Annotated[list[str] | None, typer.Argument(help="tinker paths; default: all checkpoints")] = None,
    tenant: TenantOption = None,
    delete_orphans: Annotated[
        bool, typer.Option("--delete-orphans", help="delete directories that no checkpoint or sampler names")
    ] = False,
    config: ConfigOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of the checkpoints and compare it with what was saved. Exit code 1 if something is damaged.

    A damaged checkpoint leaves the lists, and one that is whole again comes back. Directories that have no name (their
    save or their deletion was interrupted) are reported; they hold nothing that a client could ask for.
    """
    with _opened(config, home) as inspection:
        found = inspection.checkpoints(tenant, paths)
        damaged = _verify(inspection, found)
        orphans = [] if paths or tenant else inspection.orphans()
        if delete_orphans:
            inspection.delete_orphans(orphans)
    if as_json:
        facts = [{"directory": o.directory, "size_bytes": o.size_bytes, "written_at": o.written_at} for o in orphans]
        bad = [_facts(checkpoint) for checkpoint in damaged]
        print_json({"num_verified": len(found), "damaged": bad, "orphans": facts, "orphans_deleted": delete_orphans})
    else:
        _report(len(found), damaged, orphans, delete_orphans)
    if damaged:
        raise typer.Exit(1)


def _verify(inspection: Inspection, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that are damaged."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    num_bytes = sum(checkpoint.size_bytes for checkpoint in checkpoints)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    damaged = []
    with Progress(*columns, console=err, transient=True, disable=num_bytes < _PROGRESS_BYTES) as progress:
        task = progress.add_task("verifying", total=num_bytes)
        for checkpoint in checkpoints:
            found = inspection.verify(checkpoint, lambda read: progress.advance(task, read))
            if found is not None and found.damage is not None:
                damaged.append(found)
    return damaged


def _report(num_verified: int, damaged: Sequence[Checkpoint], orphans: Sequence[Orphan], deleted: bool) -> None:
    if damaged:
        print_table(
            ("damaged checkpoint", "tenant", "what is wrong"),
            [(str(item.path), item.tenant_id, item.damage or "") for item in damaged],
        )
    if orphans:
        print_table(
            ("directory without a name", "bytes", "written"),
            [(orphan.directory, f"{orphan.size_bytes:,}", day(orphan.written_at)) for orphan in orphans],
        )
        num_bytes = sum(orphan.size_bytes for orphan in orphans)
        total = f"directories without a name: {len(orphans)}, {num_bytes:,} bytes"
        out.print(f"{total}: deleted" if deleted else f"{total}; --delete-orphans deletes them")
    whole = num_verified - len(damaged)
    out.print(f"[bold {'red' if damaged else 'green'}]{whole} of {num_verified} checkpoints are whole[/]")


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "tenant_id": checkpoint.tenant_id,
        "directory": checkpoint.directory,
        "size_bytes": checkpoint.size_bytes,
        "created_at": checkpoint.created_at,
        "damage": checkpoint.damage,
    }


@contextmanager
def _opened(config: Path | None, home: Path | None) -> Iterator[Inspection]:
    from tuft.app import open_store
    from tuft.service.inspection import Inspection
    from tuft.service.services import checkpoints_root
    from tuft.store.checkpoints import CheckpointCatalog
    from tuft.store.tenants import TenantCatalog

    options = load_config(config, home=home)
    database = open_store(options)
    try:
        yield Inspection(CheckpointCatalog(database), TenantCatalog(database), checkpoints_root(options.home))
    finally:
        database.close()
