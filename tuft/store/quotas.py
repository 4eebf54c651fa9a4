"""The quotas that were set for a tenant or a key, where they are not those of the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, insert, select

from tuft.metering import Holder, QuotaName
from tuft.store.db import Database
from tuft.store.tables import quotas


class QuotaTable:
    """Rows in, records out. Raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> dict[Holder, Mapping[QuotaName, float | None]]:
        """None is no limit."""
        found: dict[Holder, dict[QuotaName, float | None]] = {}
        for row in self._database.all(select(quotas)):
            found.setdefault(Holder(row.tenant_id, row.key_number), {})[row.name] = row.value
        return dict(found)

    def set(self, holder: Holder, values: Mapping[QuotaName, float | None], forgotten: tuple[QuotaName, ...]) -> None:
        """These from now on; ``forgotten`` are those of the configuration again."""
        whose = (quotas.c.tenant_id == holder.tenant_id, quotas.c.key_number == holder.key_number)
        with self._database.transaction() as connection:
            connection.execute(delete(quotas).where(*whose, quotas.c.name.in_((*values, *forgotten))))
            if values:
                rows = [{**holder._asdict(), "name": name, "value": value} for name, value in values.items()]
                connection.execute(insert(quotas), rows)
