"""The laws that keep tenants apart, read from the source.

Who owns a thing is asked in one place; a refusal says which id it refuses; nothing is read that could run code, and
nothing of ours calls out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.layout.test_floors import edges, floor, module_name, sources

MAY_COMPARE_TENANTS = {
    "tuft.records": "Tenant.owns, for things in memory",
    "tuft.store.ownership": "own and within_reach, for rows; whose an id is",
    "tuft.service.ownership": "whether a refused id was another tenant's",
    "tuft.store.audit": "whose entries are listed, all of a kind",
    "tuft.store.checkpoints": "whose checkpoints are listed, of a tenant that the caller may see",
    "tuft.store.sessions": "joins owners to their sessions",
    "tuft.store.tenants": "tenants themselves",
    "tuft.store.usage": "whose usage is added up",
    "tuft.store.quotas": "whose quotas are read",
    "tuft.service.quotas": "whose runs are counted",
    "tuft.service.waits": "who waits behind whom",
    "tuft.engine.sampler": "whose samples decode together",
}
"""Modules that compare a tenant's id, and what for. Elsewhere: ``own(table, tenant)``, ``tenant.owns(thing)``."""

OPERATORS = {"tuft.service.tenants", "tuft.service.inspection"}
"""Where what is not found is an operator's own mistake."""

NEVER_IMPORTED = set(
    "marshal shelve dbm dill cloudpickle joblib yaml zipfile plistlib runpy code codeop xml xmlrpc "
    "requests httpx aiohttp urllib3 ftplib smtplib telnetlib socketserver".split()
)
ONLY_IN_MODULE = {
    "pickle": {"tuft.engine.mailbox"},  # between our own two processes
    "tarfile": {"tuft.store.archive"},  # headers of what is sent
    "zstandard": {"tuft.api.body"},  # within the limit of a body
    "huggingface_hub": {"tuft.models.source"},  # the configured models, at start
    "socket": {
        "tuft.app",
        "tuft.connections",
        "tuft.engine.mailbox",
        "tuft.engine.process",
        "tuft.engine.worker",
        "tuft.store.claims",
    },
    "subprocess": {"tuft.engine.worker", "tuft.models.kernels.build"},  # our own interpreter on our own modules
    "http": {"tuft.connections"},  # the names of statuses
}
NEVER_CALLED = {"eval", "exec", "compile", "__import__"}
NEVER_CALLED_OF = {
    "torch": {"load", "hub", "jit", "package", "save"},
    "np": {"load", "fromfile", "memmap", "loadtxt", "genfromtxt"},
    "numpy": {"load", "fromfile", "memmap", "loadtxt", "genfromtxt"},
    "tarfile": {"open", "TarFile"},
    "shutil": {"unpack_archive"},
    "os": {"system", "popen", "execv", "execve", "symlink", "link", "mknod"},
    "importlib": {"import_module"},
}


def test_who_owns_a_thing_is_asked_in_one_place() -> None:
    found = set()
    for path in sources():
        if "migrations" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                sides = (node.left, *node.comparators)
                if any(isinstance(side, ast.Attribute) and side.attr == "tenant_id" for side in sides):
                    found.add(module_name(path))
    assert found == set(MAY_COMPARE_TENANTS)


def test_what_is_not_found_says_which_id_it_was() -> None:
    """Or nobody would learn that it was another tenant's."""
    wrong = []
    for path in sources():
        module = module_name(path)
        if floor(module) not in ("service", "api") or module in OPERATORS:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                called = set(names_called(function))
                if called & {"NotFound", "Gone"} and "refusing" not in called:
                    wrong.append(f"{path}:{function.lineno} {function.name}")
    assert wrong == []


def names_called(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def test_nothing_is_imported_that_reads_code_or_calls_out() -> None:
    wrong = []
    for source, target in edges():
        library = target.split(".")[0]
        allowed = ONLY_IN_MODULE.get(library)
        calls_out = target == "urllib.request" and source != "tuft.cli.status"  # a client of the server itself
        if library in NEVER_IMPORTED or calls_out or (allowed is not None and source not in allowed):
            wrong.append(f"{source} imports {target}")
    assert wrong == []


def test_nothing_is_read_but_tensors_and_json() -> None:
    """A checkpoint, a custom loss or a request is data: no reader here could run what is in it."""
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
                wrong.append(f"{path}:{node.lineno} {node.func.id}()")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                never = NEVER_CALLED_OF.get(node.value.id, set())
                wrong += [f"{path}:{node.lineno} {node.value.id}.{node.attr}" for _ in {node.attr} & never]
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                wrong.append(f"{path}:{node.value.lineno} {node.arg}")
    assert wrong == []
