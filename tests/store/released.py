"""Databases as released versions of TuFT left them: their schema, and rows in every table."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from alembic import command
from sqlalchemy import Engine, MetaData, insert

from tuft.store.connecting import make_engine
from tuft.store.schema import alembic_config

DIGESTS = {
    "0001": "b42bb27190f2486df588513cbd90da2f20a3640f21f1b2f0500d8d16bb29cd38",
    "0002": "26ca76d37385bddb6e316e02550a433b830520840f05b9513078b7fe977cfe05",
}
"""Released migrations are never edited: databases out there have run them. SHA-256 of their files."""

AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LORA = {"rank": 8, "seed": 2**40, "train_attn": True, "train_mlp": False, "train_unembed": True}

Rows = Mapping[str, list[dict[str, Any]]]

_FIRST: Rows = {
    "tenants": [
        {"tenant_id": "tenant-0", "name": "default", "created_at": AT},
        {"tenant_id": "tenant-1", "name": "Jörg", "created_at": AT},
    ],
    "api_keys": [
        {"key_hash": "0" * 64, "tenant_id": "tenant-0", "hint": "abcd", "created_at": AT},
        {"key_hash": "1" * 64, "tenant_id": "tenant-1", "hint": "efgh", "created_at": AT},
    ],
    "sessions": [
        {
            "session_id": "s1",
            "tenant_id": "tenant-1",
            "created_at": AT,
            "tags": ["a", "ü"],
            "user_metadata": {"k": "v"},
            "sdk_version": "0.38.0",
            "display_name": "ÜBUNG",
            "finish_reason": None,
            "finish_detail": None,
        }
    ],
    "runs": [
        {
            "run_id": "s1:train:0",
            "tenant_id": "tenant-1",
            "session_id": "s1",
            "model_seq_id": 0,
            "base_model": "m",
            **LORA,
            "status": "unloaded",
            "created_at": AT,
            "last_request_at": AT,
            "user_metadata": {"purpose": "x"},
        }
    ],
    "samplers": [
        {
            "sampler_id": f"s1:sample:{number}",
            "tenant_id": "tenant-1",
            "session_id": "s1",
            "sampling_session_seq_id": number,
            "base_model": "m",
            "model_path": None,
            "directory": directory,
            "created_at": AT,
        }
        for number, directory in enumerate([None, "d1"])
    ],
    "checkpoints": [
        {
            "run_id": "s1:train:0",
            "kind": kind,
            "name": "0001",
            "tenant_id": "tenant-1",
            "base_model": "m",
            **LORA,
            "directory": f"d-{kind}",
            "size_bytes": 2**40,
            "has_optimizer": kind == "training",
            "created_at": AT,
            "expires_at": None,
            "user_metadata": {},
        }
        for kind in ("sampler", "training")
    ],
}

_SECOND: Rows = {
    "awaited_samples": [{"request_id": "r1", "sampler_id": "s1:sample:0", "clone_id": 2**40}],
    "custom_losses": [
        {
            "loss_id": "s1:loss:0",
            "tenant_id": "tenant-1",
            "session_id": "s1",
            "custom_loss_seq_id": 0,
            "name": "mine",
            "inputs": [["logprobs", 1]],
            "nodes": "[]",
            "created_at": AT,
        }
    ],
    "recorded_sequences": [
        {
            "session_id": "s1",
            "sequence_id": "q1",
            "tenant_id": "tenant-1",
            "prompt_tokens": b"\0\1\0\0",
            "tokens": b"\2\0\0\0",
            "logprobs": b"\0\0\0\0",
            "expires_at": AT,
        }
    ],
    "usage": [
        {
            "tenant_id": "tenant-1",
            "hour": AT.replace(minute=0, second=0, microsecond=0),
            "session_id": session_id,
            "base_model": "m",
            "kind": "training",
            "quantity": 2**40,
        }
        for session_id in ("s1", "")
    ],
    "audit_log": [{"tenant_id": "tenant-1", "at": AT, "event": "checkpoints_saved", "details": {"actor": "x"}}],
}

ROWS: Mapping[str, Rows] = {"0001": _FIRST, "0002": {**_FIRST, **_SECOND}}


def make_released(url: str, revision: str) -> None:
    """An empty database becomes one of that revision, with its rows."""
    engine = make_engine(url)
    make_schema(engine, revision)
    found = MetaData()
    found.reflect(engine)
    assert set(found.tables) - {"alembic_version"} == set(ROWS[revision]), "a table without rows"
    with engine.begin() as connection:
        for table in found.sorted_tables:
            if rows := ROWS[revision].get(table.name):
                connection.execute(insert(table), rows)
    engine.dispose()


def make_schema(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), revision)
