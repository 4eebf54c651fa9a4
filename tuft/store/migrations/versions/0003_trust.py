"""durable futures, snapshots of runs"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _durable()
    _identity()
    _quotas()
    _disk()
    _server()


def _durable() -> None:
    op.create_table(
        "futures",
        sa.Column("future_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=False),
        sa.Column("request_bytes", sa.BigInteger(), nullable=False),
        sa.Column("request", sa.LargeBinary()),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("charge", sa.JSON(), nullable=False),
        sa.Column("outcome", sa.String(length=8)),
        sa.Column("settled_at", sa.DateTime(timezone=True)),
        sa.Column("result_bytes", sa.BigInteger()),
        sa.Column("result", sa.LargeBinary()),
        sa.Column("forget_at_s", sa.Float()),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint("future_id"),
        sa.UniqueConstraint("kind", "subject_id", "seq"),
    )
    op.create_index("futures_by_outcome", "futures", ["outcome"])
    op.create_index("futures_by_forgetting", "futures", ["forget_at_s"])
    op.create_table(
        "snapshots",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"]),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table("server_clock", sa.Column("uptime_s", sa.Float(), nullable=False))
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.add_column(sa.Column("saved_seq", sa.BigInteger()))
    with op.batch_alter_table("samplers") as samplers:
        samplers.add_column(sa.Column("saved_seq", sa.BigInteger()))
    op.drop_table("awaited_samples")


def _identity() -> None:
    op.add_column("tenants", sa.Column("suspended_at", sa.DateTime(timezone=True)))
    for column in (
        sa.Column("name", sa.String(length=64), nullable=False, server_default=""),
        sa.Column("scopes", sa.String(length=64), nullable=False, server_default="train sample read"),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_at", sa.DateTime(timezone=True)),
    ):
        op.add_column("api_keys", column)
    op.create_index("api_keys_of_tenant", "api_keys", ["tenant_id"])
    _make_the_first_key_an_admin()


def _make_the_first_key_an_admin() -> None:
    """That of the tenant 'default', as a first launch makes it today: who has it owns the server."""
    tenants = sa.table("tenants", sa.column("tenant_id"), sa.column("name"))
    keys = sa.table(
        "api_keys", sa.column("key_hash"), sa.column("tenant_id"), sa.column("created_at"), sa.column("scopes")
    )
    first = (
        sa.select(keys.c.key_hash)
        .where(keys.c.tenant_id.in_(sa.select(tenants.c.tenant_id).where(tenants.c.name == "default")))
        .order_by(keys.c.created_at)
        .limit(1)
    )
    connection = op.get_bind()
    if (key_hash := connection.execute(first).scalar()) is not None:
        connection.execute(sa.update(keys).where(keys.c.key_hash == key_hash).values(scopes="train sample read admin"))


def _quotas() -> None:
    op.add_column("runs", sa.Column("key_number", sa.BigInteger(), nullable=False, server_default="0"))
    counted: list[sa.Column[Any]] = [
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("key_number", sa.BigInteger(), nullable=False),
        sa.Column("rate", sa.BigInteger(), nullable=False),
    ]
    names = [column.name for column in counted]
    ledger = op.create_table(
        "ledger",
        *counted,
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint(*names),
    )
    usage = sa.table("usage", *(sa.column(name) for name in (*names[:5], "quantity")))
    unknown = (sa.literal(0, sa.BigInteger()), sa.literal(0, sa.BigInteger()))
    rows = sa.select(*(usage.c[name] for name in names[:5]), *unknown, usage.c.quantity)
    op.get_bind().execute(sa.insert(ledger).from_select([*names, "quantity"], rows))
    op.drop_table("usage")
    op.create_table(
        "quotas",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_number", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.Double()),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint("tenant_id", "key_number", "name"),
    )
    op.create_table(
        "paces",
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("busy_ms", sa.BigInteger(), nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("base_model"),
    )


def _disk() -> None:
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.add_column(sa.Column("digest", sa.String(length=64)))
        checkpoints.add_column(sa.Column("damage", sa.Text()))
        checkpoints.add_column(sa.Column("verified_at", sa.DateTime(timezone=True)))
    op.create_index("checkpoints_by_verification", "checkpoints", ["verified_at"])


def _server() -> None:
    op.create_table(
        "server",
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":  # SQLite's integers have 64 bits anyway
        op.alter_column("audit_log", "entry_id", type_=sa.BigInteger())
        op.execute("ALTER SEQUENCE audit_log_entry_id_seq AS bigint")
