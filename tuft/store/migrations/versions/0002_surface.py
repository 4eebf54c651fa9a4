"""projects, optimizers, published checkpoints, inflight samplers, custom losses, recorded sequences, usage, audit"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("sessions") as sessions:
        sessions.add_column(sa.Column("project_id", sa.String(length=128)))
        sessions.add_column(sa.Column("heard_at", sa.DateTime(timezone=True)))
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("optimizer", sa.String(length=16), nullable=False, server_default="adamw"))
    with op.batch_alter_table("checkpoints") as checkpoints:
        checkpoints.add_column(sa.Column("optimizer", sa.String(length=16), nullable=False, server_default="adamw"))
        checkpoints.add_column(sa.Column("public", sa.Boolean(), nullable=False, server_default=sa.false()))
        checkpoints.create_index("checkpoints_of_directory", ["directory"])
    with op.batch_alter_table("samplers") as samplers:
        samplers.add_column(sa.Column("inflight_run_id", sa.String(length=128)))
        samplers.add_column(sa.Column("num_joined", sa.Integer(), nullable=False, server_default="0"))
        samplers.create_foreign_key("samplers_inflight_run", "runs", ["inflight_run_id"], ["run_id"])
        samplers.create_index("samplers_of_directory", ["directory"])
    op.create_table(
        "awaited_samples",
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("sampler_id", sa.String(length=128), nullable=False),
        sa.Column("clone_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
    )
    op.create_table(
        "custom_losses",
        sa.Column("loss_id", sa.String(length=128), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("custom_loss_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("nodes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"]),
        sa.PrimaryKeyConstraint("loss_id"),
        sa.UniqueConstraint("session_id", "custom_loss_seq_id"),
    )
    op.create_table(
        "recorded_sequences",
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("sequence_id", sa.String(length=256), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("prompt_tokens", sa.LargeBinary(), nullable=False),
        sa.Column("tokens", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"]),
        sa.PrimaryKeyConstraint("session_id", "sequence_id"),
    )
    op.create_index("recorded_sequences_by_expiry", "recorded_sequences", ["expires_at"])
    op.create_table(
        "usage",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint("tenant_id", "hour", "session_id", "base_model", "kind"),
    )
    op.create_table(
        "audit_log",
        sa.Column("entry_id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("event", sa.String(length=64), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint("entry_id"),
    )
    op.create_index("audit_log_of_tenant", "audit_log", ["tenant_id", "at"])
