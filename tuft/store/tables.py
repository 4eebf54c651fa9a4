"""The tables, as SQLAlchemy Core sees them. ``migrations/`` holds the same as steps; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

metadata = MetaData()


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on databases that keep none (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", UtcDateTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_hash", String(64), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("hint", String(8), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String(64), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("sdk_version", String(64), nullable=False),
    Column("display_name", Text),
    Column("finish_reason", String(32)),
    Column("finish_detail", Text),
    Index("sessions_of_tenant", "tenant_id", "created_at"),
)


def _lora_columns() -> list[Column[int] | Column[bool]]:
    return [
        Column("rank", Integer, nullable=False),
        Column("seed", BigInteger),
        Column("train_attn", Boolean, nullable=False),
        Column("train_mlp", Boolean, nullable=False),
        Column("train_unembed", Boolean, nullable=False),
    ]


runs = Table(
    "runs",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("session_id", ForeignKey("sessions.session_id"), nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("base_model", Text, nullable=False),
    *_lora_columns(),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_request_at", UtcDateTime, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    UniqueConstraint("session_id", "model_seq_id"),
    Index("runs_of_tenant", "tenant_id", "created_at"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(128), nullable=False),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("base_model", Text, nullable=False),
    *_lora_columns(),
    Column("directory", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("has_optimizer", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("user_metadata", JSON, nullable=False),
    PrimaryKeyConstraint("run_id", "kind", "name"),
    Index("checkpoints_of_tenant", "tenant_id", "created_at"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", String(128), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("session_id", ForeignKey("sessions.session_id"), nullable=False),
    Column("sampling_session_seq_id", BigInteger, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("model_path", Text),
    Column("directory", Text),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("session_id", "sampling_session_seq_id"),
)
