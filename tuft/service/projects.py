"""Projects: how sessions are grouped, and with whom their runs and checkpoints are shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tuft.config import DEFAULT_PROJECT, ProjectSection
from tuft.errors import InvalidInput
from tuft.records import Shared, Tenant

_MAX_LENGTH = 128


class Projects:
    """Those of the configuration have members; any other id is the private label of the tenant who uses it, so that
    scripts which name a project run as they are."""

    def __init__(
        self, sections: Sequence[ProjectSection], denied: Callable[[Tenant, str], object] = lambda _tenant, _id: None
    ) -> None:
        """``denied`` is told who names a project of others."""
        self._members: Shared = {section.project_id: frozenset(section.tenants) for section in sections}
        self._denied = denied

    def check(self, tenant: Tenant, project_id: str) -> None:
        """Whoever is no member of a project does not learn that there is one: to them its id is a label like any other.
        Raises InvalidInput for what can be no id at all."""
        if not 1 <= len(project_id) <= _MAX_LENGTH or not project_id.isprintable():
            raise InvalidInput("project_id", project_id, f"must be 1 to {_MAX_LENGTH} printable characters")
        members = self._members.get(project_id)
        if members is not None and tenant.name not in members:
            self._denied(tenant, project_id)

    def shared_with(self, tenant: Tenant) -> Shared:
        """The configured projects that the tenant is a member of."""
        return {project_id: members for project_id, members in self._members.items() if tenant.name in members}

    def placed(self, tenant: Tenant, project_id: str | None) -> str | None:
        """What a session of the tenant in that project is kept with: None in the default project."""
        if project_id is None or project_id == DEFAULT_PROJECT:
            return None
        self.check(tenant, project_id)
        return project_id
