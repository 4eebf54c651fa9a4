"""Projects: how sessions are grouped, and with whom their runs and checkpoints are shared."""

from __future__ import annotations

from collections.abc import Sequence

from tuft.config import DEFAULT_PROJECT, ProjectSection
from tuft.errors import Forbidden, InvalidInput
from tuft.records import Shared, Tenant

_MAX_LENGTH = 128


class Projects:
    """Those of the configuration have members; any other id is the private label of the tenant who uses it, so that
    scripts which name a project run as they are."""

    def __init__(self, sections: Sequence[ProjectSection]) -> None:
        self._members: Shared = {section.project_id: frozenset(section.tenants) for section in sections}

    def check_member(self, tenant: Tenant, project_id: str) -> None:
        """Raises Forbidden for a project that is shared by others, InvalidInput for what can be no id at all."""
        if not 1 <= len(project_id) <= _MAX_LENGTH or not project_id.isprintable():
            raise InvalidInput("project_id", project_id, f"must be 1 to {_MAX_LENGTH} printable characters")
        members = self._members.get(project_id)
        if members is not None and tenant.name not in members:
            raise Forbidden(f"project_id: {tenant.name!r} is no member of the project {project_id!r}")

    def shared_with(self, tenant: Tenant) -> Shared:
        """The configured projects that the tenant is a member of."""
        return {project_id: members for project_id, members in self._members.items() if tenant.name in members}

    def placed(self, tenant: Tenant, project_id: str | None) -> str | None:
        """What a session of the tenant in that project is kept with: None in the default project."""
        if project_id is None or project_id == DEFAULT_PROJECT:
            return None
        self.check_member(tenant, project_id)
        return project_id
