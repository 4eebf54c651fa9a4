"""How many sessions a tenant may have at once."""

from __future__ import annotations

import pytest

from tuft.errors import QuotaExceeded
from tuft.records import Session, Tenant
from tuft.service.services import Services


def test_sessions_beyond_the_limit_are_refused_until_one_is_finished(
    services: Services, alice: Tenant, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = services.sessions
    monkeypatch.setattr(sessions, "_max_live", 2)
    sessions.create(alice, (), {}, "test", None)
    with pytest.raises(QuotaExceeded, match="alice has 2 that live; limits.max_sessions_per_tenant is 2"):
        sessions.create(alice, (), {}, "test", None)
    bob = services.tenants.authenticate(services.tenants.create_key("bob"))
    sessions.create(bob, (), {}, "test", None)
    sessions.finish(alice, session.session_id, "success", None)
    sessions.create(alice, (), {}, "test", None)
