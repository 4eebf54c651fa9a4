from __future__ import annotations

from tuft.losses import CustomLoss
from tuft.records import Session, Tenant, now
from tuft.store.custom_losses import CustomLossTable
from tuft.store.db import open_database
from tuft.store.sessions import SessionCatalog
from tuft.store.tenants import TenantCatalog

ALICE = Tenant("tenant-a", "alice")
LOSS = CustomLoss("mine", (("logprobs", 2), ("q", 0)), '[{"op": "placeholder"}]')


def test_a_loss_is_found_in_its_session_until_that_is_over(database_url: str) -> None:
    database = open_database(database_url)
    TenantCatalog(database).ensure_tenant(ALICE)
    table = CustomLossTable(database)
    for session_id in ("s1", "s2"):
        SessionCatalog(database).add(Session(session_id, ALICE.tenant_id, now(), (), {}, "0.38.0", None))
        table.add(ALICE, session_id, 0, f"{session_id}:loss:0", LOSS)
    assert table.get("s1", "s1:loss:0") == LOSS
    assert table.get("s2", "s1:loss:0") is None
    assert (table.count("s1"), table.sessions()) == (1, {"s1", "s2"})
    table.delete("s1")
    assert (table.get("s1", "s1:loss:0"), table.get("s2", "s2:loss:0")) == (None, LOSS)
    database.close()
