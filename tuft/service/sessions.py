"""SDK clients' connections."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

from tuft.errors import Gone, NotFound
from tuft.records import Session, Tenant, now
from tuft.store.catalog import Catalog


class Sessions:
    """A session groups the runs and samplers that one client made. It is over when the client says so, or when
    nothing was heard of it for ``timeout_s``."""

    def __init__(self, catalog: Catalog, timeout_s: float) -> None:
        self._catalog = catalog
        self._timeout_s = timeout_s
        self._started_at_s = time.monotonic()
        self._heard_at_s: dict[str, float] = {}
        self._finished: set[str] = set()

    def create(
        self,
        tenant: Tenant,
        tags: Sequence[str],
        user_metadata: Mapping[str, str],
        sdk_version: str,
        display_name: str | None,
    ) -> Session:
        session = Session(
            session_id=str(uuid4()),
            tenant_id=tenant.tenant_id,
            created_at=now(),
            tags=tuple(tags),
            user_metadata=dict(user_metadata),
            sdk_version=sdk_version,
            display_name=display_name,
        )
        self._catalog.add_session(session)
        self._heard_at_s[session.session_id] = time.monotonic()
        return session

    def require(self, tenant: Tenant, session_id: str) -> Session:
        """The tenant's session of that id; raises NotFound."""
        session = self._catalog.session(tenant, session_id)
        if session is None:
            raise NotFound(f"session_id: {session_id!r} is unknown")
        if not session.finished:
            self._heard_at_s[session_id] = time.monotonic()
        return session

    def heartbeat(self, tenant: Tenant, session_id: str) -> None:
        """Raises Gone, which ends the client's heartbeats, if the session has finished or is unknown."""
        session = self._catalog.session(tenant, session_id)
        if session is None or session.finished:
            raise Gone(f"session_id: {session_id!r} has finished or is unknown")
        self._heard_at_s[session_id] = time.monotonic()

    def is_over(self, session_id: str) -> bool:
        """True once the client said so or fell silent; one of an earlier server may still come back."""
        heard_at_s = self._heard_at_s.get(session_id, self._started_at_s)
        return session_id in self._finished or time.monotonic() - heard_at_s > self._timeout_s

    def finish(self, tenant: Tenant, session_id: str, reason: str, detail: str | None) -> None:
        """Record why the client ended; the first reason wins."""
        self._catalog.finish_session(self.require(tenant, session_id).session_id, reason, detail)
        self._finished.add(session_id)

    def list(self, tenant: Tenant, limit: int, offset: int) -> tuple[list[Session], int]:
        """One page, newest first, and the number of all."""
        return self._catalog.sessions(tenant, limit, offset)

    def get(self, tenant: Tenant, session_id: str) -> tuple[Session, Sequence[str], Sequence[str]]:
        """The session, its run ids and its sampler ids."""
        session = self.require(tenant, session_id)
        runs, _ = self._catalog.runs(tenant, limit=1000, offset=0, session_id=session_id)
        samplers = self._catalog.samplers(tenant, session_id)
        return session, [run.run_id for run in reversed(runs)], [sampler.sampler_id for sampler in samplers]
