"""Copies of checkpoints: a name of one's own for weights that someone else may take back, or let expire."""

from __future__ import annotations

from dataclasses import replace
from uuid import NAMESPACE_OID, uuid4, uuid5

from tuft.errors import InvalidInput, NotFound
from tuft.records import Checkpoint, CheckpointPath, Run, Tenant, now
from tuft.service.checkpoints import Checkpoints
from tuft.service.sessions import Sessions
from tuft.service.validation import check_seq, check_ttl
from tuft.store.catalog import Catalog

_SOURCE = "copied_from"


class Copies:
    """A copy has a run to itself, which was never live and cannot be trained. Its files are its source's: no byte is
    written, and they stay until the last name is gone."""

    def __init__(self, catalog: Catalog, sessions: Sessions, checkpoints: Checkpoints) -> None:
        self._catalog = catalog
        self._sessions = sessions
        self._checkpoints = checkpoints

    def copy(
        self,
        tenant: Tenant,
        source_path: str,
        session_id: str,
        model_seq_id: int,
        ttl_seconds: int | None,
        access_token: str | None,
    ) -> str:
        """Copy into the run ``model_seq_id`` of a session of the tenant's; returns the copy's tinker path. The source's
        expiry is not the copy's.

        A retry gets the first call's. Raises InvalidInput, or NotFound for what the tenant may not read.
        """
        check_ttl(ttl_seconds)
        check_seq(model_seq_id, "model_seq_id")
        self._sessions.require(tenant, session_id)
        run_id = f"{session_id}:train:{model_seq_id}"
        run = self._catalog.run(tenant, run_id)
        if run is not None and run.user_metadata.get(_SOURCE) != source_path:
            raise InvalidInput("model_seq_id", model_seq_id, f"{run_id} holds something else already")
        path = replace(CheckpointPath.parse(source_path), run_id=run_id)
        if self._checkpoints.at(path) is None:
            source = self._checkpoints.get(tenant, source_path, access_token)
            self._checkpoints.note_read(tenant, source, "copy")
            if run is None:
                self._catalog.add_run(_run_of_copy(tenant, source, session_id, model_seq_id, run_id))
            self._checkpoints.add_copy(tenant, source, path, ttl_seconds)
        return str(path)

    def copy_into_project(
        self,
        tenant: Tenant,
        source_path: str,
        project_id: str,
        ttl_seconds: int | None,
        access_token: str | None,
        idempotency_key: str | None,
    ) -> str:
        """Copy into a session that is made for it in that project. A retry is what has the same key."""
        check_ttl(ttl_seconds)
        session_id = str(uuid5(NAMESPACE_OID, f"{tenant.tenant_id} {idempotency_key}") if idempotency_key else uuid4())
        try:
            self._sessions.require(tenant, session_id)
        except NotFound:
            self._checkpoints.get(tenant, source_path, access_token)  # else there is no need of a session
            self._sessions.create(tenant, (), {}, "", f"copy of {source_path}", project_id, session_id)
        path = self.copy(tenant, source_path, session_id, 0, ttl_seconds, access_token)
        self._sessions.finish(tenant, session_id, "success", None)
        return path


def _run_of_copy(tenant: Tenant, source: Checkpoint, session_id: str, model_seq_id: int, run_id: str) -> Run:
    moment = now()
    return Run(
        run_id=run_id,
        tenant_id=tenant.tenant_id,
        session_id=session_id,
        model_seq_id=model_seq_id,
        base_model=source.base_model,
        spec=source.spec,
        status="unloaded",
        created_at=moment,
        last_request_at=moment,
        user_metadata={_SOURCE: str(source.path)},
        optimizer=source.optimizer,
    )
