"""Every path that the installed SDK calls, in a table of docs/protocol.md: who answers it, and which test calls it.

The table is made from the SDK's own source, so that a new release shows at once what is new. If a change is meant:
``python -m tests.layout.test_protocol`` writes the table anew. A test says what it calls by
``@pytest.mark.calls("POST /api/v1/...")``.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tinker
from fastapi import APIRouter
from fastapi.routing import APIRoute

import tuft.api
from tuft.api.http import API_PREFIX

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "protocol.md"
BEGIN, END = "<!-- table: written by python -m tests.layout.test_protocol -->", "<!-- end of table -->"
RELEASES = json.loads(Path(__file__).with_name("sdk_paths.json").read_text())
"""``"METHOD path"`` to the first release of the SDK that has it and, if it is gone, the last; read from its wheels."""
NOT_OURS = {
    "POST /api/v1/sample": "before sessions: SDKs up to 0.2.2",
}
"""Paths of retired SDKs that nothing answers, and why."""
METHODS = {"get", "post", "put", "delete", "patch"}


def test_the_page_lists_what_the_installed_sdk_calls() -> None:
    assert table() in PAGE.read_text(), "run `python -m tests.layout.test_protocol` if the change is meant"


def test_every_call_of_the_installed_sdk_is_answered_and_tested() -> None:
    missing = {call: row for call, *row in rows() if call not in NOT_OURS and "" in row}
    assert not missing


def test_marks_name_calls_that_exist() -> None:
    assert set(marked()) <= {call for call, *_ in rows()}


def table() -> str:
    lines = [
        BEGIN,
        "",
        "| call | since SDK | answered by | called in |",
        "|---|---|---|---|",
        *(f"| `{call}` | {release} | {answer} | {test} |" for call, release, answer, test in rows()),
        "",
        END,
    ]
    return "\n".join(lines)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Call, releases, where it is answered, one test; a text that is missing is empty."""
    installed = set(calls_of_the_sdk())
    tests = marked()
    for call in sorted(installed | set(RELEASES), key=lambda call: (call.split()[1], call)):
        first, *last = RELEASES.get(call, [f"**new in {tinker.__version__}**"])
        release = first if call in installed else f"{first} to {last[0]}"
        answer = NOT_OURS.get(call) or endpoint_of(call)
        yield call, release, answer, next(iter(sorted(tests[call])), "")


def calls_of_the_sdk() -> Iterator[str]:
    """What the installed SDK's source calls: every call with a path among its arguments."""
    for file in Path(tinker.__file__).parent.rglob("*.py"):
        source = file.read_text()
        if "/api/v1/" not in source or file.name.endswith("_test.py"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[str]:
    """``client.post("/api/v1/...")``, or ``_request("POST", url, "/api/v1/...")``."""
    texts = [text for text in map(_text, [*node.args, *(keyword.value for keyword in node.keywords)]) if text]
    name = ast.unparse(node.func).rpartition(".")[2].strip("_")
    method = name if name in METHODS else next((text for text in texts if text.lower() in METHODS), "")
    if method:
        for path in texts:
            if path.startswith("/api/v1/"):
                yield f"{method.upper()} {path}"


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def endpoint_of(call: str) -> str:
    """``module.function`` that answers, found by the routes' own patterns."""
    method, path = call.split()
    path = path.replace("/checkpoints/{}", "/checkpoints/weights/name").replace("{}", "x")
    in_router = path.removeprefix(API_PREFIX)
    for route in routes():
        if method in route.methods and (route.path_regex.fullmatch(in_router) or route.path_regex.fullmatch(path)):
            return f"`{route.endpoint.__module__.removeprefix('tuft.')}.{route.endpoint.__name__}`"
    return ""


@cache
def routes() -> list[APIRoute]:
    modules = [importlib.import_module(f"tuft.api.{module.name}") for module in pkgutil.iter_modules(tuft.api.__path__)]
    routers = [value for module in modules for value in vars(module).values() if isinstance(value, APIRouter)]
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]


def marked() -> dict[str, list[str]]:
    """Call to the tests that are marked with it."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        source = file.read_text()
        if "mark.calls(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.calls":
                    for argument in decorator.args:
                        assert isinstance(argument, ast.Constant)
                        name = getattr(node, "name", "")
                        found[str(argument.value)].append(f"`{file.relative_to(ROOT / 'tests')}::{name}`")
    return found


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    PAGE.write_text(before + table() + after)
