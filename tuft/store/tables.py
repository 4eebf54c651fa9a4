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
    Double,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
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
    Column("suspended_at", UtcDateTime),
)

# A revoked key keeps its row, so that the audit log and usage keep their meaning. ``scopes``: words between spaces.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_hash", String(64), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("hint", String(8), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("name", String(64), nullable=False, server_default=""),
    Column("scopes", String(64), nullable=False, server_default="train sample read"),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Index("api_keys_of_tenant", "tenant_id"),
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
    Column("project_id", String(128)),
    Column("heard_at", UtcDateTime),
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
    Column("optimizer", String(16), nullable=False, server_default="adamw"),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_request_at", UtcDateTime, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("key_number", BigInteger, nullable=False, server_default="0"),
    UniqueConstraint("session_id", "model_seq_id"),
    Index("runs_of_tenant", "tenant_id", "created_at"),
)

# ``digest``: the SHA-256 of the manifest of its files (``store.integrity``), null for those of older servers.
# ``verified_at``: when they were last read through; ``damage``: what was wrong with them then.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(128), nullable=False),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("base_model", Text, nullable=False),
    *_lora_columns(),
    Column("optimizer", String(16), nullable=False, server_default="adamw"),
    Column("public", Boolean, nullable=False, server_default=false()),
    Column("directory", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("has_optimizer", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("user_metadata", JSON, nullable=False),
    Column("saved_seq", BigInteger),
    Column("digest", String(64)),
    Column("damage", Text),
    Column("verified_at", UtcDateTime),
    PrimaryKeyConstraint("run_id", "kind", "name"),
    Index("checkpoints_of_tenant", "tenant_id", "created_at"),
    Index("checkpoints_of_directory", "directory"),
    Index("checkpoints_by_verification", "verified_at"),
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
    Column("inflight_run_id", ForeignKey("runs.run_id")),
    Column("num_joined", Integer, nullable=False, server_default="0"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("saved_seq", BigInteger),
    UniqueConstraint("session_id", "sampling_session_seq_id"),
    Index("samplers_of_directory", "directory"),
)

# Every acknowledged request whose answer is a future: an operation of a run, a sample, ... Its client counts it by
# ``subject_id`` and ``seq``. ``request`` and ``result`` are encoded records (``tuft.encoding``); a large one is a file
# (``store.spool``), and null here. ``outcome`` is null while the future is pending, then "ok", "failed" or "spent";
# ``result_bytes`` is null once the result is no longer kept. ``forget_at_s``: when it may go, on the clock of
# ``server_clock``, which stands still while no server runs and does not jump.
futures = Table(
    "futures",
    metadata,
    Column("future_id", String(64), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("key_number", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("subject_id", String(128), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("request_bytes", BigInteger, nullable=False),
    Column("request", LargeBinary),
    Column("accepted_at", UtcDateTime, nullable=False),
    Column("charge", JSON, nullable=False),
    Column("outcome", String(8)),
    Column("settled_at", UtcDateTime),
    Column("result_bytes", BigInteger),
    Column("result", LargeBinary),
    Column("forget_at_s", Float),
    UniqueConstraint("kind", "subject_id", "seq"),
    Index("futures_by_outcome", "outcome"),
    Index("futures_by_forgetting", "forget_at_s"),
)

# Which server has the database (``store.claims``), where no lock on a file tells. At most one row.
server = Table(
    "server",
    metadata,
    Column("token", String(32), nullable=False),
    Column("description", Text, nullable=False),
)

server_clock = Table("server_clock", metadata, Column("uptime_s", Float, nullable=False))

# The newest state of each run on disk: all operations up to ``seq``.
snapshots = Table(
    "snapshots",
    metadata,
    Column("run_id", ForeignKey("runs.run_id"), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("directory", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

custom_losses = Table(
    "custom_losses",
    metadata,
    Column("loss_id", String(128), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("session_id", ForeignKey("sessions.session_id"), nullable=False),
    Column("custom_loss_seq_id", BigInteger, nullable=False),
    Column("name", Text, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("nodes", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("session_id", "custom_loss_seq_id"),
)

# What stable_reinforce needs of sampling: little-endian int32 tokens and float32 logprobs.
recorded_sequences = Table(
    "recorded_sequences",
    metadata,
    Column("session_id", ForeignKey("sessions.session_id"), nullable=False),
    Column("sequence_id", String(256), nullable=False),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("prompt_tokens", LargeBinary, nullable=False),
    Column("tokens", LargeBinary, nullable=False),
    Column("logprobs", LargeBinary, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("session_id", "sequence_id"),
    Index("recorded_sequences_by_expiry", "expires_at"),
)

# One row an hour and purpose; session_id is empty and key_number 0 where there is none. ``rate``: the price at that
# time (``metering.rate_of``). Rows too old to be told by the hour are added up in one of the hour 1970-01-01 00:00.
ledger = Table(
    "ledger",
    metadata,
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("hour", UtcDateTime, nullable=False),
    Column("session_id", String(64), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("key_number", BigInteger, nullable=False),
    Column("rate", BigInteger, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "hour", "session_id", "base_model", "kind", "key_number", "rate"),
)

# What a tenant (key_number 0) or one key of theirs may have, where it is not what the configuration says. A ``value``
# of null is no limit.
quotas = Table(
    "quotas",
    metadata,
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("key_number", BigInteger, nullable=False),
    Column("name", String(32), nullable=False),
    Column("value", Double),
    PrimaryKeyConstraint("tenant_id", "key_number", "name"),
)

# How fast each base model was trained here of late: tokens, and the milliseconds in which they were computed.
paces = Table(
    "paces",
    metadata,
    Column("base_model", String(256), primary_key=True),
    Column("num_tokens", BigInteger, nullable=False),
    Column("busy_ms", BigInteger, nullable=False),
    Column("measured_at", UtcDateTime, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("entry_id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.tenant_id"), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("event", String(64), nullable=False),
    Column("details", JSON, nullable=False),
    Index("audit_log_of_tenant", "tenant_id", "at"),
)
