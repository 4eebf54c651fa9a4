"""SDK clients' connections."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import uuid4

from tuft.config import DEFAULT_PROJECT
from tuft.errors import Gone, NotFound, QuotaExceeded, refusing
from tuft.records import Session, SessionSearch, SessionSummary, Tenant, now
from tuft.service.audit import Audit
from tuft.service.projects import Projects
from tuft.service.traces import Traces
from tuft.store.sessions import SessionCatalog

_NOTE_INTERVAL_S = 60.0
_SOON_S = 5.0
_RUNNING = timedelta(minutes=5)


class Sessions:
    """A session groups the runs and samplers that one client made. It is over when the client says so, or when
    nothing was heard of it for ``timeout_s``."""

    def __init__(
        self, catalog: SessionCatalog, projects: Projects, audit: Audit, traces: Traces, timeout_s: float, max_live: int
    ) -> None:
        self._catalog = catalog
        self._projects = projects
        self._audit = audit
        self._traces = traces
        self._timeout_s = timeout_s
        self._max_live = max_live
        self._of_tenant: defaultdict[str, set[str]] = defaultdict(set)  # those that were heard
        self._started_at_s = time.monotonic()
        self._heard_at_s: dict[str, float] = {}  # of those that have finished: before all time
        self._noted_at_s = self._started_at_s

    def create(
        self,
        tenant: Tenant,
        tags: Sequence[str],
        user_metadata: Mapping[str, str],
        sdk_version: str,
        display_name: str | None,
        project_id: str | None = None,
        session_id: str | None = None,
    ) -> Session:
        """Raises InvalidInput for what can be no project, QuotaExceeded beyond ``max_live`` sessions of the tenant.
        ``session_id``, if given, must be one that no one has."""
        self._require_room(tenant)
        session = Session(
            session_id=session_id or str(uuid4()),
            tenant_id=tenant.tenant_id,
            created_at=now(),
            tags=tuple(tags),
            user_metadata=dict(user_metadata),
            sdk_version=sdk_version,
            display_name=display_name,
            project_id=self._projects.placed(tenant, project_id),
        )
        self._catalog.add(session)
        if session.project_id is not None:
            self._note_project(tenant, session)
        self._hear(session)
        return session

    def require(self, tenant: Tenant, session_id: str) -> Session:
        """The tenant's session of that id; raises NotFound."""
        session = self.find(tenant, session_id, accessible=False)
        if not session.finished:
            self._hear(session)
        return session

    def find(self, tenant: Tenant, session_id: str, accessible: bool) -> Session:
        """The tenant's session, or if ``accessible`` one of a project it shares; raises NotFound."""
        shared = self._projects.shared_with(tenant) if accessible else {}
        session = self._catalog.session(tenant, session_id, shared)
        if session is None:
            raise refusing("session", session_id, NotFound(f"session_id: {session_id!r} is unknown"))
        return session

    def missing(self, tenant: Tenant, session_id: str) -> NotFound | None:
        """What ``find`` would raise of an accessible one."""
        try:
            self.find(tenant, session_id, accessible=True)
        except NotFound as error:
            return error
        return None

    def signed_for(self, session_id: str) -> Session:
        """Whoever owns it, for the holder of a link that is signed. Raises NotFound."""
        session = self._catalog.get(session_id)
        if session is None:
            raise refusing("trace", session_id, NotFound(f"session_id: {session_id!r} is unknown"))
        return session

    def heartbeat(self, tenant: Tenant, session_id: str) -> None:
        """Raises Gone, which ends the client's heartbeats, if the session has finished or is unknown."""
        session = self._catalog.session(tenant, session_id)
        if session is None or session.finished:
            raise refusing("session", session_id, Gone(f"session_id: {session_id!r} has finished or is unknown"))
        self._hear(session)

    def is_over(self, session_id: str) -> bool:
        """True once the client said so or fell silent; one of an earlier server may still come back."""
        return time.monotonic() - self._heard_at_s.get(session_id, self._started_at_s) > self._timeout_s

    def finish(self, tenant: Tenant, session_id: str, reason: str, detail: str | None) -> None:
        """Record why the client ended; the first reason wins."""
        if self._catalog.finish(self.require(tenant, session_id).session_id, reason, detail):
            self._traces.note(session_id, f"client finished: {reason}")
        self._heard_at_s[session_id] = -math.inf

    def assign(self, tenant: Tenant, session_id: str, project_id: str) -> None:
        """Move the tenant's session, with all that was made in it, into a project. Raises NotFound or InvalidInput."""
        session = self.find(tenant, session_id, accessible=False)
        session = replace(session, project_id=self._projects.placed(tenant, project_id))
        self._catalog.assign(session_id, session.project_id)
        self._note_project(tenant, session)

    def list(self, tenant: Tenant, limit: int, offset: int, accessible: bool = False) -> tuple[list[Session], int]:
        """One page, newest first, and the number of all."""
        shared = self._projects.shared_with(tenant) if accessible else {}
        return self._catalog.page(tenant, limit, offset, shared)

    def parts(self, session: Session) -> tuple[Sequence[str], Sequence[str]]:
        """The session's run ids and its sampler ids."""
        return self._catalog.parts(session.session_id)

    async def search(
        self, tenant: Tenant, search: SessionSearch
    ) -> tuple[Sequence[SessionSummary], tuple[datetime, str] | None]:
        """One page of what the tenant may see, newest first, and where the next begins. Raises InvalidInput for what
        can be no project."""
        for project_id in search.project_ids or ():
            self._projects.check(tenant, project_id)
        shared, since = self._projects.shared_with(tenant), now() - _RUNNING
        return await asyncio.to_thread(self._catalog.search, tenant, shared, search, since)  # it may read every session

    async def sweep(self) -> None:
        """Write down now and then who was heard, and forget who fell silent."""
        moment_s = time.monotonic()
        if moment_s - self._noted_at_s < _NOTE_INTERVAL_S:
            return
        heard = [key for key, heard_at_s in self._heard_at_s.items() if heard_at_s >= self._noted_at_s]
        await asyncio.to_thread(self._catalog.heard, heard)
        self._noted_at_s = moment_s
        if moment_s - self._started_at_s > self._timeout_s:  # from here on, who is not in the table is over
            silent = [key for key, heard_at_s in self._heard_at_s.items() if moment_s - heard_at_s > self._timeout_s]
            for session_id in silent:
                del self._heard_at_s[session_id]
                for own in self._of_tenant.values():
                    own.discard(session_id)

    def _hear(self, session: Session) -> None:
        self._heard_at_s[session.session_id] = time.monotonic()
        self._of_tenant[session.tenant_id].add(session.session_id)

    def _require_room(self, tenant: Tenant) -> None:
        num_live = sum(not self.is_over(session_id) for session_id in self._of_tenant[tenant.tenant_id])
        if num_live >= self._max_live:
            raise QuotaExceeded(
                f"sessions: tenant {tenant.name} has {num_live:,} that live; limits.max_sessions_per_tenant is "
                f"{self._max_live:,}; finish one first",
                _SOON_S,
            )

    def _note_project(self, tenant: Tenant, session: Session) -> None:
        project_id = session.project_id or DEFAULT_PROJECT
        self._audit.note(tenant, "project_session_assign", project_id=project_id, session_id=session.session_id)
