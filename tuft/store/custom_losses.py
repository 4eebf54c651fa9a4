"""Losses that clients wrote. Each belongs to the session in which it was created."""

from __future__ import annotations

from sqlalchemy import delete, func, select

from tuft.losses import CustomLoss
from tuft.records import Tenant, now
from tuft.store.db import Database
from tuft.store.tables import custom_losses


class CustomLossTable:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, tenant: Tenant, session_id: str, custom_loss_seq_id: int, loss_id: str, loss: CustomLoss) -> None:
        self._database.insert(
            custom_losses,
            loss_id=loss_id,
            tenant_id=tenant.tenant_id,
            session_id=session_id,
            custom_loss_seq_id=custom_loss_seq_id,
            name=loss.name,
            inputs=[list(given) for given in loss.inputs],
            nodes=loss.nodes,
            created_at=now(),
        )

    def get(self, session_id: str, loss_id: str) -> CustomLoss | None:
        of_session = (custom_losses.c.session_id == session_id, custom_losses.c.loss_id == loss_id)
        row = self._database.first(select(custom_losses).where(*of_session))
        if row is None:
            return None
        return CustomLoss(row.name, tuple((name, rank) for name, rank in row.inputs), row.nodes)

    def count(self, session_id: str) -> int:
        query = select(func.count()).select_from(custom_losses).where(custom_losses.c.session_id == session_id)
        with self._database.transaction() as connection:
            return connection.execute(query).scalar_one()

    def sessions(self) -> set[str]:
        """Those that have any."""
        with self._database.transaction() as connection:
            return set(connection.execute(select(custom_losses.c.session_id).distinct()).scalars())

    def delete(self, session_id: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(delete(custom_losses).where(custom_losses.c.session_id == session_id))
