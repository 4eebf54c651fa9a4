from __future__ import annotations

import pytest

from tuft.config import Config
from tuft.errors import InvalidInput
from tuft.records import Tenant
from tuft.service.projects import Projects

ALICE, BOB, CAROL = Tenant("a", "alice"), Tenant("b", "bob"), Tenant("c", "carol")
CONFIGURED = Config(
    projects=[
        {"project_id": "team", "tenants": ["alice", "bob"]},
        {"project_id": "hers", "tenants": ["carol"]},
        {"project_id": "nobodys"},
    ]
)
PROJECTS = Projects(CONFIGURED.projects)


def test_a_project_that_is_not_listed_is_anyones_label() -> None:
    for tenant in (ALICE, CAROL):
        assert PROJECTS.placed(tenant, "my experiments / 3") == "my experiments / 3"
    assert "my experiments / 3" not in PROJECTS.shared_with(ALICE)


def test_to_who_is_no_member_a_listed_project_is_a_label_and_somebody_is_told() -> None:
    told: list[tuple[str, str]] = []
    projects = Projects(CONFIGURED.projects, lambda tenant, project_id: told.append((tenant.name, project_id)))
    assert projects.placed(ALICE, "team") == "team"
    assert told == []
    for tenant, project_id in ((CAROL, "team"), (ALICE, "hers"), (ALICE, "nobodys")):
        assert projects.placed(tenant, project_id) == project_id
        assert project_id not in projects.shared_with(tenant)
    assert told == [("carol", "team"), ("alice", "hers"), ("alice", "nobodys")]


def test_a_member_shares_with_all_members() -> None:
    assert PROJECTS.shared_with(BOB) == {"team": {"alice", "bob"}}
    assert PROJECTS.shared_with(Tenant("d", "dave")) == {}


@pytest.mark.parametrize("project_id", [None, "default"])
def test_no_project_is_the_default_one(project_id: str | None) -> None:
    assert PROJECTS.placed(ALICE, project_id) is None


@pytest.mark.parametrize("project_id", ["", "x" * 129, "a\nb", "\x00"])
def test_what_can_be_no_id_is_refused(project_id: str) -> None:
    with pytest.raises(InvalidInput, match="project_id"):
        PROJECTS.placed(ALICE, project_id)


@pytest.mark.parametrize(
    ("projects", "why"),
    [
        ([{"project_id": "p"}, {"project_id": "p"}], "listed twice"),
        ([{"project_id": "default"}], "every tenant's own"),
    ],
)
def test_a_configuration_that_says_two_things_is_refused(projects: list[dict[str, str]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Config(projects=projects)
