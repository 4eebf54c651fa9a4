"""The laws of the house: which floor may see which, and what each may import. Read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tuft"

GROUND = {
    "tuft",
    *(
        f"tuft.{name}"
        for name in "config encoding errors fairness footprint metering losses optimizers prefixes records".split()
    ),
    *(f"tuft.{name}" for name in "machine scrub sections tokens turns types".split()),
}
MAY_SEE = {
    "models": set(),
    "store": set(),
    "engine": {"models"},
    "service": {"store"},
    "api": {"service"},
}
"""Floor to the floors below that it may import; the ground is everyone's. cli, app and embedded see all."""

SQL = {"sqlalchemy", "alembic", "sqlite3", "psycopg"}
ONLY_IN = {
    "torch": {"models", "engine"},
    **{name: {"store"} for name in SQL},
    "google": {"api"},
    "fastapi": {"api"},
    "starlette": {"api"},
    "uvicorn": {"connections"},
    "tinker": set(),
    "transformers": set(),
    "peft": set(),
    "pickle": {"engine"},
}
FORBIDDEN_NAME_PARTS = ("Manager", "Controller", "Handler", "Helper", "utils")


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "_pb2" not in path.name]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> str:
    """``tuft.engine.trainer`` -> ``engine``; ``tuft.app`` -> ``app``; the ground -> ``ground``."""
    if module in GROUND:
        return "ground"
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Every imported module, whether at the top or inside a function."""
    known = {module_name(source) for source in sources()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def edges() -> Iterator[tuple[str, str]]:
    for path in sources():
        for target in imports(path):
            yield module_name(path), target


def test_imports_go_down_only() -> None:
    wrong = []
    for source, target in edges():
        if not target.startswith("tuft") or floor(target) == "ground":
            continue
        here, there = floor(source), floor(target)
        if here in ("cli", "app", "__main__") or here == there:
            continue
        if target == "tuft.engine.base" and here == "service":
            continue
        if there not in MAY_SEE.get(here, set()):
            wrong.append(f"{source} imports {target}")
    assert wrong == []


def test_the_ground_stands_on_nothing_of_ours() -> None:
    wrong = [f"{source} imports {target}" for source, target in edges() if source in GROUND and target in set(MAY_SEE)]
    assert wrong == []
    allowed = {"numpy", "pydantic", "pydantic_settings", "tuft", *sys.stdlib_module_names}
    assert [pair for pair in edges() if pair[0] in GROUND and pair[1].split(".")[0] not in allowed] == []


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for source, target in edges():
        if target.startswith("tuft.") and source != target:
            graph.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in list(graph):
        visit(module, ())


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_stays_on_its_floor(library: str) -> None:
    found = {floor(source) for source, target in edges() if target.split(".")[0] == library}
    assert found <= ONLY_IN[library]


def test_engine_base_is_free_of_torch_and_of_the_engine() -> None:
    targets = {target for source, target in edges() if source == "tuft.engine.base"}
    assert not any(target.startswith(("torch", "tuft.engine", "tuft.models")) for target in targets)


@pytest.mark.parametrize("statement", ["import tuft.cli", "import tuft.api.http", "import tuft.app"])
def test_torch_is_loaded_by_the_engine_process_alone(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_names_say_what_a_thing_is() -> None:
    wrong = []
    for path in sources():
        if any(part.lower() in path.stem.lower() for part in FORBIDDEN_NAME_PARTS):
            wrong.append(str(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                wrong += [f"{path}: {node.name}" for part in FORBIDDEN_NAME_PARTS if part.lower() in node.name.lower()]
    assert wrong == []


def test_files_functions_and_classes_stay_small() -> None:
    wrong = []
    for path in sources():
        text = path.read_text()
        if "migrations" in path.parts:
            continue
        if text.count("\n") > 400:
            wrong.append(f"{path}: {text.count(chr(10))} lines, 400 allowed")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                limit = 300 if isinstance(node, ast.ClassDef) else 60
                if size > limit:
                    wrong.append(f"{path}:{node.lineno} {node.name}: {size} lines, {limit} allowed")
    assert wrong == []


def test_a_broad_except_says_why_on_its_line() -> None:
    wrong = []
    for path in sources():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            stripped = line.strip()
            if stripped.startswith(("except Exception", "except BaseException", "except:")) and "#" not in stripped:
                wrong.append(f"{path}:{number}")
    assert wrong == []


def test_no_function_only_forwards_its_arguments() -> None:
    """``def f(self, a, b): return self._g(a, b)`` adds a name and nothing else."""
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _only_forwards(node):
                wrong.append(f"{path}:{node.lineno} {node.name}")
    assert wrong == []


def _only_forwards(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or function.decorator_list:
        return False
    call = body[0].value.value if isinstance(body[0].value, ast.Await) else body[0].value
    own = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
    if not isinstance(call, ast.Call) or not own or call.keywords:
        return False
    passed = [argument.id if isinstance(argument, ast.Name) else None for argument in call.args]
    # across objects a method may translate one noun's vocabulary into another's; within one, it is noise
    target = call.func
    same_object = isinstance(target, ast.Name) or (
        isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    )
    return passed == own and same_object and not (isinstance(target, ast.Name) and target.id[0].isupper())


def test_every_package_option_is_an_open_range_and_the_constraints_pin_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    requirements = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    for requirement in requirements:
        name = requirement.split(";")[0].split(">")[0].split("[")[0].strip()
        assert "==" not in requirement, f"{requirement}: pins belong into constraints.txt"
        if name != "tuft":
            assert name.lower() in pinned, f"{name} has no tested version in constraints.txt"
