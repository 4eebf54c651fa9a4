"""Samples of whose end their clients have not been told: after a restart, these are lost, and can be said to be."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import bindparam, delete, select

from tuft.records import SamplingClient
from tuft.store.db import Database
from tuft.store.tables import awaited_samples


class AwaitedSamples:
    """Rows of all tenants; a sampler's owner is known by its own row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, request_id: str, client: SamplingClient) -> None:
        self._database.insert(
            awaited_samples, request_id=request_id, sampler_id=client.sampler_id, clone_id=client.clone_id
        )

    def remove(self, request_ids: Collection[str]) -> None:
        if not request_ids:
            return
        statement = delete(awaited_samples).where(awaited_samples.c.request_id == bindparam("given"))
        with self._database.transaction() as connection:
            connection.execute(statement, [{"given": request_id} for request_id in request_ids])

    def all(self) -> dict[str, SamplingClient]:
        rows = self._database.all(select(awaited_samples))
        return {row.request_id: SamplingClient(row.sampler_id, row.clone_id) for row in rows}
