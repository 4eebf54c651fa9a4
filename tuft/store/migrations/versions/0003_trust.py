"""durable futures, snapshots of runs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _durable()


def _durable() -> None:
    op.create_table(
        "futures",
        sa.Column("future_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=False),
        sa.Column("request_bytes", sa.BigInteger(), nullable=False),
        sa.Column("request", sa.LargeBinary()),
        sa.Column("accepted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.String(length=8)),
        sa.Column("settled_at", sa.DateTime(timezone=True)),
        sa.Column("result_bytes", sa.BigInteger()),
        sa.Column("result", sa.LargeBinary()),
        sa.Column("forget_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint("future_id"),
        sa.UniqueConstraint("kind", "subject_id", "seq"),
    )
    op.create_index("futures_by_outcome", "futures", ["outcome"])
    op.create_index("futures_by_forgetting", "futures", ["forget_at"])
    op.create_table(
        "snapshots",
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"]),
        sa.PrimaryKeyConstraint("run_id"),
    )
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.add_column(sa.Column("saved_seq", sa.BigInteger()))
    with op.batch_alter_table("samplers") as samplers:
        samplers.add_column(sa.Column("saved_seq", sa.BigInteger()))
