"""How fast each base model was trained here of late."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import insert, select, update

from tuft.records import now
from tuft.store.db import Database
from tuft.store.tables import paces


class MeasuredPace(NamedTuple):
    num_tokens: int
    busy_ms: int
    measured_at: datetime

    @property
    def tokens_per_s(self) -> float:
        return 1000 * self.num_tokens / self.busy_ms


class PaceTable:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, base_model: str, num_tokens: int, busy_ms: int) -> None:
        values = {"num_tokens": num_tokens, "busy_ms": busy_ms, "measured_at": now()}
        with self._database.transaction() as connection:
            changed = connection.execute(update(paces).where(paces.c.base_model == base_model).values(**values))
            if changed.rowcount == 0:
                connection.execute(insert(paces).values(base_model=base_model, **values))

    def get(self, base_model: str) -> MeasuredPace | None:
        row = self._database.first(select(paces).where(paces.c.base_model == base_model))
        return None if row is None else MeasuredPace(row.num_tokens, row.busy_ms, row.measured_at)
