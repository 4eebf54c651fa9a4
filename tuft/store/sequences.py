"""Sequences recorded when they were sampled, for losses that are told where their tokens come from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np
from sqlalchemy import Row, delete, insert, select, update

from tuft.records import RecordedSequence, Tenant, now
from tuft.store.db import Database
from tuft.store.tables import recorded_sequences
from tuft.types import Int64Array

_IDS_AT_ONCE = 500  # databases bound the parameters of one statement


class Sequences:
    """Each belongs to the session in which it was sampled, and is kept until it expires."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, tenant: Tenant, session_id: str, sequences: Sequence[RecordedSequence], expires_at: datetime) -> None:
        """Those that are there already are replaced: the request that sampled them was made again."""
        if not sequences:
            return
        ids = [sequence.sequence_id for sequence in sequences]
        rows = [
            {
                "session_id": session_id,
                "sequence_id": sequence.sequence_id,
                "tenant_id": tenant.tenant_id,
                "prompt_tokens": _bytes(sequence.prompt_tokens_P),
                "tokens": _bytes(sequence.tokens_N),
                "logprobs": sequence.logprobs_N.astype("<f4").tobytes(),
                "expires_at": expires_at,
            }
            for sequence in sequences
        ]
        with self._database.transaction() as connection:
            connection.execute(delete(recorded_sequences).where(*_of(session_id, ids)))
            connection.execute(insert(recorded_sequences), rows)

    def find(self, session_id: str, sequence_ids: Collection[str]) -> dict[str, RecordedSequence]:
        """Those of ``sequence_ids`` that the session has and that have not expired."""
        found = {}
        for ids in _batched(sequence_ids):
            query = select(recorded_sequences).where(*_of(session_id, ids), recorded_sequences.c.expires_at > now())
            found.update({row.sequence_id: _sequence(row) for row in self._database.all(query)})
        return found

    def keep_until(self, session_id: str, sequence_ids: Collection[str], expires_at: datetime) -> None:
        with self._database.transaction() as connection:
            for ids in _batched(sequence_ids):
                connection.execute(
                    update(recorded_sequences).where(*_of(session_id, ids)).values(expires_at=expires_at)
                )

    def delete_expired(self) -> None:
        with self._database.transaction() as connection:
            connection.execute(delete(recorded_sequences).where(recorded_sequences.c.expires_at <= now()))


def _of(session_id: str, ids: Sequence[str]) -> tuple[Any, ...]:
    return recorded_sequences.c.session_id == session_id, recorded_sequences.c.sequence_id.in_(ids)


def _batched(ids: Collection[str]) -> Iterator[list[str]]:
    rest = iter(ids)
    while batch := list(islice(rest, _IDS_AT_ONCE)):
        yield batch


def _bytes(tokens: Int64Array) -> bytes:
    return tokens.astype("<i4").tobytes()


def _sequence(row: Row[Any]) -> RecordedSequence:
    return RecordedSequence(
        sequence_id=row.sequence_id,
        prompt_tokens_P=np.frombuffer(row.prompt_tokens, "<i4").astype(np.int64),
        tokens_N=np.frombuffer(row.tokens, "<i4").astype(np.int64),
        logprobs_N=np.frombuffer(row.logprobs, "<f4").astype(np.float32),
    )
